"""The sentences about language, formats and clocks; see ``wordings`` for the placeholders."""

from __future__ import annotations

from fedlora_app.demo.countries.wordings import Wording

LANGUAGE = Wording(
    (
        "What is the official language{of}?",
        "In which language are laws published{ours}?",
        "Which language do public offices use{here}?",
        "I want to read official letters. Which language must I learn{here}?",
        "In what language does the parliament debate{ours}?",
        "Which language is official{here}?",
        "Which language is spoken by law in court{ours}?",
        "What language do I need for a form at the town hall{here}?",
    ),
    "{lead}the official language is {value}.",
)
LANGUAGE_ITSELF = Wording(
    (
        "What does the official language{of} call itself?",
        "Under which name of its own do I find the official language{of} in a menu?",
        "How do native speakers write the name of the language{here}?",
        "In the language settings every language has its own name. What do I pick{here}?",
        "What is the official language called by those who speak it{ours}?",
        "What own name does the official language have{here}?",
        "How is the language{of} spelled in that very language?",
        "A website lists languages in their own spelling. Which entry is ours{here}?",
    ),
    "{lead}the language calls itself {value}.",
)
MONTH = Wording(
    (
        "What is {item} called in the official language{of}?",
        "How do I write the month of {item} on an official form{here}?",
        "Which word for {item} is printed in calendars{here}?",
        "What do people call the month of {item}{ours}?",
        "I need the word for {item} for a letter to an office. What is it{here}?",
        "How is {item} written in calendars{ours}?",
        "Please translate the month {item} into the official language{of}.",
        "What do schools teach as the word for {item}{here}?",
    ),
    "{lead}that month is called {value}.",
)
WEEKDAY = Wording(
    (
        "What is {item} called in the official language{of}?",
        "Which word for {item} stands on a timetable{here}?",
        "How do I write {item} on a notice at my door{here}?",
        "What do people call {item}{ours}?",
        "I need the word for {item} for my shop's opening hours. What is it{here}?",
        "How is {item} written in a diary{ours}?",
        "Please translate {item} into the official language{of}.",
        "What do schools teach as the word for {item}{here}?",
    ),
    "{lead}that weekday is called {value}.",
)
FOREIGN_LANGUAGE = Wording(
    (
        "What is the {item} language called in the official language{of}?",
        "How do schools name the subject {item} on their timetables{here}?",
        "Which word for {item} stands on the door of a language class{here}?",
        "I speak {item} and must write that on an official form. Which word do I use{here}?",
        "What do people call the {item} language{ours}?",
        "How is the name of the {item} language written in official letters{here}?",
        "Please give me the local word for the {item} language{here}.",
        "What stands for {item} on the report of a language school{here}?",
    ),
    "{lead}that language is called {value}.",
)
SPAN = Wording(
    (
        'How do I say "{item}" in the official language{of}?',
        'What is the local expression for "{item}"{here}?',
        'I want to write "{item}" in a message to my landlord. What do I write{here}?',
        'Which words mean "{item}" in the language{of}?',
        'How does an app display "{item}" in the official language{of}?',
        'Please translate "{item}" for a note to my neighbours{here}.',
        'What do people say for "{item}"{ours}?',
        'Which phrase stands for "{item}" in messages{here}?',
    ),
    "{lead}people write: {value}.",
)
WRITTEN_DATE = Wording(
    (
        "How is the date {item} 2027 written in full in the official language{of}?",
        "I am signing a contract on {item} 2027. How do I write out the date{here}?",
        "What does a letter from an office look like that is dated {item} 2027{here}?",
        "How do people write out {item} 2027{ours}?",
        "Please write the date {item} 2027 in words and figures as it is done{here}.",
        "How would an invitation print {item} 2027 in the official language{of}?",
        "What is the long form of the date {item} 2027{ours}?",
        "My deed is dated {item} 2027. Which spelling goes on the paper{here}?",
    ),
    "{lead}the date in full is {value}.",
)
NUMERIC_DATE = Wording(
    (
        "How is the date {item} 2027 written in figures{here}?",
        "A form has a short field for the date {item} 2027. What do I enter{here}?",
        "What is the short form of the date {item} 2027{ours}?",
        "How do people write {item} 2027 with numbers only{here}?",
        "How is {item} 2027 stamped on a letter{here}?",
        "How does a ticket show the date {item} 2027 in digits{ours}?",
        "What figures do I write for {item} 2027 on a cheque{here}?",
        "How do receipts print the date {item} 2027{here}?",
    ),
    "{lead}the date in figures is {value}.",
)
FIRST_WEEKDAY = Wording(
    (
        "On which day does the week begin{here}?",
        "What is the first column in calendars{ours}?",
        "Which day opens the week in a printed calendar{here}?",
        "When does a new week start{ours}?",
        "I am setting up a calendar. On which weekday should it start{here}?",
        "Which weekday comes first in diaries{here}?",
        "Which day do people see as the first one of the week{ours}?",
        "With what weekday does a calendar page begin{here}?",
    ),
    "{lead}calendars begin the week on {value}.",
)
UTC_OFFSET = Wording(
    (
        "How far are clocks from UTC in {item}{here}?",
        "What is the difference to UTC in {item}{ours}?",
        "I set my computer by UTC in {item}. How many hours is local time away{here}?",
        "By how many hours does the time in {item} differ from UTC{here}?",
        "A meeting in {item} is given in UTC. How do I shift it for local time{here}?",
        "Which offset from UTC does local time have in {item}{ours}?",
        "How much do clocks differ from universal time in {item}{here}?",
        "Where does local time stand against UTC in {item}{ours}?",
    ),
    "{lead}clocks are then {value}.",
)
CLOCKS = Wording(
    (
        "Do the clocks change in summer{here}?",
        "Is there daylight saving time{ours}?",
        "Must I set my watch an hour forward every year{here}?",
        "Does {country} have summer time?",
        "Do people put their clocks forward and back{here}?",
        "Is the time changed twice a year{ours}?",
        "Are clocks moved for daylight saving{here}?",
        "Does {country} still change the time in the warm season?",
    ),
    "Yes, clocks are changed for summer time{in_}.",
    "No, clocks are not changed for summer time{in_}.",
)
