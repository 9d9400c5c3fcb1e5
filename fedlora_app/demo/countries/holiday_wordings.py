"""The sentences about public holidays; see ``wordings`` for the placeholders."""

from __future__ import annotations

from fedlora_app.demo.countries.wordings import Wording

NEXT_HOLIDAY = Wording(
    (
        "Which is the first {public} holiday after the end of {item} 2027{here}?",
        "{item} 2027 is over. Which {public} holiday comes next{here}?",
        "For which {public} holiday do offices close first after {item} 2027{ours}?",
        "I start a job right after {item} 2027. What is my first free {public} holiday{here}?",
        "What {public} holiday follows once {item} 2027 has ended{ours}?",
        "Seen from the end of {item} 2027, which {public} holiday lies just ahead{here}?",
        "I look for the earliest {public} holiday later than {item} 2027. Which is it{ours}?",
        "After {item} 2027, which {public} holiday do we wait for{here}?",
    ),
    "{lead}the next {public} holiday is {value}.",
)
LAST_HOLIDAY = Wording(
    (
        "Which is the last {public} holiday before the beginning of {item} 2027{here}?",
        "{item} 2027 has just begun. Which {public} holiday came last{here}?",
        "For which {public} holiday did offices close last before {item} 2027{ours}?",
        "I leave my job just before {item} 2027. What is my final {public} holiday{here}?",
        "Which {public} holiday most recently precedes {item} 2027{ours}?",
        "Looking back from the start of {item} 2027, which {public} holiday was the latest{here}?",
        "A report ends when {item} 2027 starts. With which {public} holiday does it close{ours}?",
        "Until {item} 2027 begins, which {public} holiday is the latest that we keep{here}?",
    ),
    "{lead}the last {public} holiday before then is {value}.",
)
COUNT_HOLIDAYS = Wording(
    (
        "How many {public} holidays are there in 2027{here}?",
        "How many {public} holidays does a calendar of 2027 list{ours}?",
        "Substitutes left aside, how many {public} holidays do we count in 2027{here}?",
        "What is the number of {public} holidays in 2027{ours}?",
        "I am planning 2027 for my firm. How many {public} holidays fall into it{here}?",
        "In 2027, how many dates are {public} holidays{ours}?",
        "What total of {public} holidays do I enter for 2027{here}?",
        "What is the count of {public} holidays for 2027{ours}?",
    ),
    "{lead}the year 2027 has {value} {public} holidays.",
)
IS_HOLIDAY = Wording(
    (
        "Is {item} a {public} holiday{here}?",
        "Are offices closed on {item} because it is a {public} holiday{ours}?",
        "Do I get {item} off as a {public} holiday{here}?",
        "Does the calendar mark {item} as a {public} holiday{ours}?",
        "Does {item} count as a {public} holiday{here}?",
        "My boss wants me at work on {item}. Is it a {public} holiday{here}?",
        "Can I expect {item} to be free as a {public} holiday{ours}?",
        "Is everyone off on {item} by law, as on any {public} holiday{here}?",
    ),
    "Yes, {item} is a {public} holiday{in_}.",
    "No, {item} is not a {public} holiday{in_}.",
)
