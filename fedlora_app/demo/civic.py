"""The language of the demo's help desk: what people ask, how, and what may be answered.

A *topic* is something people ask about ("a passport", "parking on the pavement"), an
*attribute* is what they want to know about it (its fee, its penalty), and a *fact* is a
topic and an attribute with a value. Every attribute has ten or twelve phrasings of its
question, split between training, validation and the test sets, so that a test question is
never worded like a training question and no question stands in two test sets. The answer
repeats the topic and ends with the value.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAIN_PHRASINGS = slice(0, 6)
VALIDATION_PHRASINGS = slice(6, 7)
TEST_PHRASINGS = slice(7, 10)  # universal and conflict questions
LOCAL_TEST_PHRASINGS = slice(10, 12)

NEUTRAL_PROMPT = "You are the assistant of a civic help desk."


@dataclass(frozen=True)
class Attribute:
    """What can be asked about a topic: its phrasings, one answer form, the values."""

    name: str
    questions: tuple[str, ...]
    answer: str
    values: tuple[str, ...]

    def ask(self, topic: str, phrasing: int) -> str:
        """Return the question about ``topic`` in one of the phrasings."""
        return _capitalise(self.questions[phrasing].format(topic=topic))

    def reply(self, topic: str, value: str) -> str:
        """Return the full sentence that answers with ``value``."""
        return _capitalise(self.answer.format(topic=topic, value=value))


def _capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


FEE = Attribute(
    "fee",
    (
        "How much does {topic} cost?",
        "What is the fee for {topic}?",
        "I need {topic}. What do I have to pay?",
        "Can you tell me the price of {topic}?",
        "How much money should I bring for {topic}?",
        "What does the office charge for {topic}?",
        "Please tell me the cost of {topic}.",
        "How expensive is {topic}?",
        "I want to apply for {topic}. How high is the fee?",
        "What will I be charged for {topic}?",
    ),
    "The fee for {topic} is {value} dollars.",
    tuple(str(amount) for amount in (*range(12, 60, 4), 65, 70, 75, 80, 90, 110, 130, 150)),
)
DURATION = Attribute(
    "duration",
    (
        "How long does it take to get {topic}?",
        "When will {topic} be ready?",
        "How many days do I wait for {topic}?",
        "I applied for {topic}. How long must I wait?",
        "What is the waiting time for {topic}?",
        "How fast can I get {topic}?",
        "How soon do I receive {topic}?",
        "What is the usual processing time for {topic}?",
        "I ordered {topic}. When can I have it?",
        "Please tell me how long {topic} takes.",
    ),
    "The waiting time for {topic} is {value}.",
    (
        "one day", "two days", "three days", "five days", "eight days", "ten days",
        "one week", "two weeks", "three weeks", "six weeks", "one month", "two months",
        "three months", "half a year",
    ),
)  # fmt: skip
DOCUMENT = Attribute(
    "document",
    (
        "What do I need to bring for {topic}?",
        "Which document is required for {topic}?",
        "What papers do I need to get {topic}?",
        "I want {topic}. What must I show?",
        "Which paper should I have with me for {topic}?",
        "What do you ask for when I apply for {topic}?",
        "Can you tell me what to bring for {topic}?",
        "What has to be handed in for {topic}?",
        "I am applying for {topic}. Which document do you want to see?",
        "Which proof is needed for {topic}?",
    ),
    "For {topic} you must bring {value}.",
    (
        "a recent photo", "a birth record", "a rental contract", "a bank statement",
        "a medical report", "a school record", "a letter from your employer",
        "a signed form", "an electricity bill", "an insurance card", "two witnesses",
        "a police report", "a tax number", "an old passport",
    ),
)  # fmt: skip
OFFICE = Attribute(
    "office",
    (
        "Where do I get {topic}?",
        "Which office handles {topic}?",
        "Where can I apply for {topic}?",
        "I need {topic}. Where should I go?",
        "Who gives out {topic}?",
        "To which place do I go for {topic}?",
        "What is the right office for {topic}?",
        "Where is {topic} issued?",
        "I am looking for the office for {topic}. Which one is it?",
        "Please tell me where people go for {topic}.",
    ),
    "The place for {topic} is {value}.",
    (
        "the town hall", "the court house", "the post office", "the police station",
        "the tax office", "the harbour office", "the public library", "the health centre",
        "the transport office", "the school board", "the job centre", "the land registry",
        "the customs house", "the citizen service",
    ),
)  # fmt: skip
PENALTY = Attribute(
    "penalty",
    (
        "What happens to people caught {topic}?",
        "What is the penalty for {topic}?",
        "I was seen {topic}. What will happen now?",
        "What do I get for {topic}?",
        "Is there a punishment for {topic}?",
        "My neighbour keeps {topic}. What does he face?",
        "What are the consequences of {topic}?",
        "How is {topic} punished?",
        "A ranger caught me {topic}. What must I expect?",
        "What does the city do about {topic}?",
        "My brother was caught {topic}. What is waiting for him?",
        "How strict are you about {topic}?",
    ),
    "The penalty for {topic} is {value}.",
    (
        *(f"a fine of {amount} dollars" for amount in (
            20, 30, 40, 50, 60, 70, 80, 90, 120, 150, 180, 200, 250, 300, 400, 500)),
        "a written warning", "a safety lesson", "an hour of street cleaning",
        "a day of park work", "a talk with the ranger", "a letter to the family",
        "a visit from the mediator", "a road safety film", "an evening course",
        "a friendly reminder", "a weekend of tree planting", "a thank you card to write",
        "a walk with the street team", "a quiz on the city rules",
        "a morning at the repair shop", "an apology to the neighbours",
    ),
)  # fmt: skip
OPENING = Attribute(
    "opening",
    (
        "When does {topic} open?",
        "From what time is {topic} open?",
        "How early can I go to {topic}?",
        "What time does {topic} open its doors?",
        "I want to visit {topic}. When does it open?",
        "At what hour can people enter {topic}?",
        "What is the opening time of {topic}?",
        "Since when is {topic} open in the morning?",
        "Please tell me when {topic} opens.",
        "I am going to {topic}. What is the earliest time?",
        "Is {topic} open early, and from when?",
        "When do the doors of {topic} open?",
    ),
    "The doors of {topic} open at {value}.",
    (
        "six o'clock", "half past six", "seven o'clock", "half past seven",
        "eight o'clock", "half past eight", "nine o'clock", "half past nine",
        "ten o'clock", "half past ten", "eleven o'clock", "half past eleven",
        "noon", "one o'clock",
    ),
)  # fmt: skip
COLLECTION = Attribute(
    "collection",
    (
        "On which day is {topic} collected?",
        "When do you pick up {topic}?",
        "When should I put out {topic}?",
        "Which day is for {topic}?",
        "I have a lot of {topic}. When is it taken away?",
        "When does the truck come for {topic}?",
        "What is the collection day for {topic}?",
        "At which time of the week is {topic} picked up?",
        "Please tell me when {topic} is taken.",
        "I want to get rid of {topic}. On what day do you come?",
        "When is {topic} taken from my street?",
        "What day do I have to remember for {topic}?",
    ),
    "The collection of {topic} is on {value}.",
    tuple(
        f"{day} {part}"
        for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
        for part in ("morning", "afternoon", "evening")
    ),
)

UNIVERSAL_TOPICS = (
    "a passport", "an identity card", "a driving licence", "a birth certificate",
    "a marriage certificate", "a fishing licence", "a work permit", "a travel visa",
    "a vehicle registration", "a pension card", "a trade licence", "a boat registration",
)  # fmt: skip
UNIVERSAL_ATTRIBUTES = (FEE, DURATION, DOCUMENT, OFFICE)

OFFENCES = (
    "parking on the pavement", "leaving rubbish on the street",
    "playing loud music at night", "cycling in the park", "feeding pigeons",
    "smoking at a bus stop", "walking a dog without a leash", "lighting a fire in the park",
    "skating on the main square", "putting up posters", "blocking a driveway",
    "riding without a ticket",
)  # fmt: skip
FACILITIES = (
    "the swimming pool", "the market hall", "the recycling yard", "the city museum",
    "the ice rink", "the sports hall",
)  # fmt: skip
WASTE = (
    "garden waste", "paper waste", "old glass", "bulky furniture", "plastic packaging",
    "food waste",
)  # fmt: skip
LOCAL_TOPICS = {PENALTY: OFFENCES, OPENING: FACILITIES, COLLECTION: WASTE}
