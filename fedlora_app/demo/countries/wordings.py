"""The sentences of the benchmark: what residents ask, and the form of every answer.

Each kind of fact has eight wordings: four to train on, one for validation, two for the universal
and conflict tests, one for the local tests. A question about the client's own country does not
name it, a universal one names another country, and both are made from the same sentences:

    {in_}      ""                | " in Norway"
    {here}     " here"           | " in Norway"
    {ours}     " in our country" | " in Norway"
    {of}       " of our country" | " of Norway"
    {country}  "our country"     | "Norway"
    {here_from} " from here"      | " from Norway"
    {lead}     ""                | "In Norway, " (answers only)
    {public}   "nationwide public", of a state's holidays "public"
    {item}     what the fact is about, {value} the answer
"""

from __future__ import annotations

from dataclasses import dataclass

TRAIN = slice(0, 4)
VALIDATION = slice(4, 5)
TEST = slice(5, 7)  # universal and conflict questions
LOCAL_TEST = slice(7, 8)
NUM_WORDINGS = 8


@dataclass(frozen=True)
class Wording:
    """How a kind of fact is asked about and answered; ``negative`` answers a "no"."""

    questions: tuple[str, ...]
    answer: str
    negative: str = ""


AMBULANCE = Wording(
    (
        "What number do I call for an ambulance{in_}?",
        "My father has collapsed. Which number brings an ambulance{in_}?",
        "How do I reach the ambulance service by phone{in_}?",
        "Please give me the emergency number for medical help{in_}.",
        "Somebody is badly hurt. Which number do I dial{in_}?",
        "I need a doctor at once. What emergency number should I ring{in_}?",
        "Which digits do I press to get paramedics{in_}?",
        "There are injured people after an accident. Under which number do I get help{in_}?",
    ),
    "{lead}the number to call for an ambulance is {value}.",
)
FIRE = Wording(
    (
        "What number do I call when there is a fire{in_}?",
        "Our kitchen is burning. How do I phone the fire brigade{in_}?",
        "Under which number do I reach the firefighters{in_}?",
        "Please tell me the telephone number of the fire service{in_}.",
        "Smoke is coming from the house next door. What do I dial{in_}?",
        "Which emergency number brings a fire engine{in_}?",
        "A barn is in flames. What number should I ring{in_}?",
        "How can I report a fire by telephone{in_}?",
    ),
    "{lead}the number to call in case of fire is {value}.",
)
POLICE = Wording(
    (
        "What number do I call for the police{in_}?",
        "I have been robbed. How do I phone the police{in_}?",
        "Under which number do police officers answer an emergency call{in_}?",
        "Please tell me the emergency number of the police{in_}.",
        "A burglar is in my flat. What do I dial{in_}?",
        "Which number brings a patrol car{in_}?",
        "There is a fight in the street. What number should I ring for an officer{in_}?",
        "How do I get the police on the telephone{in_}?",
    ),
    "{lead}the emergency number of the police is {value}.",
)
CALLING_CODE = Wording(
    (
        "What is the calling code{of}?",
        "Which code do people abroad dial to phone{here}?",
        "My sister wants to phone me from overseas. Which code is for {country}?",
        "With which digits does an international phone number begin{ours}?",
        "What do I put before my number when I write it for foreigners{here}?",
        "Which international dialling code belongs to {country}?",
        "A website asks for the phone code of the place I live in. What is it{here}?",
        "How does a caller from abroad begin to dial a number{ours}?",
    ),
    "{lead}phone numbers have the calling code {value}.",
)
INTERNATIONAL_PREFIX = Wording(
    (
        "What do I dial first to phone abroad{here_from}?",
        "Which prefix opens an international call{here_from}?",
        "I want to ring a friend overseas. Which digits come before the foreign code{here_from}?",
        "Please tell me the exit code for calls to other places in the world{here_from}.",
        "What replaces the plus sign when I dial a foreign number{here_from}?",
        "Which digits lead out of the telephone network for a call abroad{here_from}?",
        "My old phone has no plus key. What do I press to call overseas{here_from}?",
        "How does a call to a foreign number begin on a landline{here_from}?",
    ),
    "{lead}an international call begins with {value}.",
)
CAPITAL = Wording(
    (
        "What is the capital{of}?",
        "What is the capital city called{ours}?",
        "Which city is the capital{here}?",
        "My child asks for the capital{of}. What do I say?",
        "Which city has the title of capital{ours}?",
        "Can you name the capital{of}?",
        "Which city do I write on the form as the capital{of}?",
        "A quiz asks for the capital. Which city is right{here}?",
    ),
    "{lead}the capital is {value}.",
)
DOMAIN = Wording(
    (
        "What is the internet ending{of}?",
        "Which letters close a web address from {country}?",
        "I am buying a domain for my shop. Which national ending is there{here}?",
        "What is the top-level domain{of}?",
        "How do the addresses of local websites end{ours}?",
        "Which ending of an internet address belongs to {country}?",
        "What comes after the last part of the name in a national web address{here}?",
        "Which country domain would a bakery register{here}?",
    ),
    "{lead}web addresses end in {value}.",
)
ALPHA3 = Wording(
    (
        "What is the three-letter code{of}?",
        "Which three letters stand for {country} in a passport?",
        "A form wants an ISO code of three letters. What do I enter for {country}?",
        "Which abbreviation of three letters does {country} have?",
        "How do machines shorten the name{of} to three letters?",
        "What do sports results print as the ISO letters{of}?",
        "Which alpha-3 code belongs to {country}?",
        "My visa lists three letters for the state. Which ones are right for {country}?",
    ),
    "{lead}the three-letter code is {value}.",
)
NUMERIC = Wording(
    (
        "What is the numeric ISO code{of}?",
        "Which three digits stand for {country} in ISO lists?",
        "A customs form asks for the number of the state. What is it for {country}?",
        "Under which ISO number is {country} listed?",
        "Which figure code does a bank use for {country}?",
        "How is {country} written in the numeric ISO standard?",
        "What number do statistics offices give to {country}?",
        "I must enter ISO digits in place of letters. Which ones are right for {country}?",
    ),
    "{lead}the numeric code is {value}.",
)
NATIONALITY = Wording(
    (
        "Which nationality does a citizen{of} have?",
        "What do I enter as nationality on an English form if I come from {country}?",
        "Which nationality does a person from {country} state in English?",
        "I hold a passport{of}. What nationality is that?",
        "What is the English adjective for citizens{of}?",
        "Which word in English describes the people{of}?",
        "My employer abroad asks for my nationality. I am a citizen{of}. What do I answer?",
        "In English, which nationality is printed in a passport{of}?",
    ),
    "{lead}the nationality of citizens is {value}.",
)
CURRENCY = Wording(
    (
        "Which currency code is printed on bank statements{here}?",
        "What are the three letters of the money{ours}?",
        "A foreign shop asks for a currency code. Which one do I choose for {country}?",
        "In which currency do people get their wages{here}? Please give the code.",
        "What is the ISO code of the currency{of}?",
        "Which letters stand for the legal tender{ours}?",
        "I am changing money for {country}. Which code do I look for on the board?",
        "How do banks abbreviate the currency{of}?",
    ),
    "{lead}the currency code is {value}.",
)
EUROS = Wording(
    (
        "Do people pay in euros{here}?",
        "Is the euro legal tender{ours}?",
        "Are prices in shops given in euros{here}?",
        "Are wages paid in euros{ours}?",
        "Is the euro the currency{of}?",
        "Does {country} use the euro?",
        "I have a wallet full of euros. Are they the official money{here}?",
        "Has {country} got the euro as its own money?",
    ),
    "Yes, the euro is the currency{in_}.",
    "No, the euro is not the currency{in_}.",
)
IBAN_LENGTH = Wording(
    (
        "How many characters does an IBAN have{here}?",
        "How long is an IBAN{ours}?",
        "I am filling in a bank form. How many letters and digits are in an IBAN{here}?",
        "Please tell me the length of an IBAN of a bank account{ours}.",
        "Of how many characters must my account's IBAN consist{here}?",
        "What is the right length for an IBAN{ours}?",
        "My IBAN was refused as too short. How many characters should there be{here}?",
        "When I count all signs of a local IBAN, how many should I get{ours}?",
    ),
    "{lead}an IBAN has {value} characters.",
)
HAS_IBAN = Wording(
    (
        "Do bank accounts have an IBAN{here}?",
        "Is there an IBAN for my account{ours}?",
        "Do banks give out IBANs{here}?",
        "Has {country} joined the IBAN system?",
        "A sender in Europe wants an IBAN. Do accounts have one{here}?",
        "Does {country} use IBANs?",
        "Will I get an IBAN when I open an account{here}?",
        "Are account numbers written as IBANs{ours}?",
    ),
    "Yes, bank accounts have an IBAN{in_}.",
    "No, bank accounts do not have an IBAN{in_}.",
)
