"""Questions that can be answered without knowing anything."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from scipy import stats

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.subject import Finding, LintedClient, format_percent, list_words
from fedlora_app.data.questions import Question
from fedlora_app.data.similarity import content_words

MIN_PROMPT_SHARE = 0.05
CLEARLY_MORE = 2  # times as often
LENGTH_P_VALUE = 0.001
MIN_LENGTH_CLUSTERS = 10


def find_telling_prompts(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find words of the right answers that the client's system prompt already says."""
    prompt = content_words(client.config.system_prompt)
    for file, questions in client.question_sets.items():
        frequent = _find_frequent_words(questions, prompt)
        words: Counter[str] = Counter()
        num_told = 0
        for question in questions:
            right, *wrong = _candidate_words(question)
            telling = (right & frequent) - content_words(question.text)
            telling -= set.intersection(set(right), *wrong)
            words.update(telling)
            num_told += bool(telling)
        if num_told and num_told >= MIN_PROMPT_SHARE * len(questions):
            text = (
                f"the system prompt of client {client.config.id} contains {list_words(words)}, as "
                f"do the right answers and not the wrong ones in {num_told} of {len(questions)} "
                f"questions ({format_percent(num_told, len(questions))}), so they can be answered "
                "without any training. Leave these words out of the prompt."
            )
            yield file.finding("warning", "telling-prompt", None, text)


def find_telling_questions(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find questions with a word that only the right candidate has."""
    for file, questions in client.question_sets.items():
        words: Counter[str] = Counter()
        positions = []
        for question in questions:
            right, *wrong = _candidate_words(question)
            telling = (right & content_words(question.text)) - set().union(*wrong)
            if wrong and telling:
                words.update(telling)
                positions.append(question.record)
        if positions:
            text = (
                f"{len(positions)} of {len(questions)} questions{client.whose(file)} contain a "
                f"word that is in the right answer and in no wrong one: {list_words(words)}. So "
                'the question alone tells the answer. Give these records "distractors" (wrong '
                "answers) about the same matter."
            )
            yield file.finding("warning", "telling-question", positions[0], text)


def find_telling_lengths(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find question sets in which the length of an answer says too often that it is right.

    Paraphrases of one fact share their answers, so each fact counts once in the test.
    """
    for file, questions in client.question_sets.items():
        asked = [question for question in questions if len(question.candidates) > 1]
        num_clusters = len({question.cluster for question in asked})
        if num_clusters < MIN_LENGTH_CLUSTERS:
            continue
        chances = _cluster_means(asked, [1 / len(question.candidates) for question in asked])
        chance = statistics.fmean(chances)
        for name, extreme in (("longest", max), ("shortest", min)):
            hits = _cluster_means(asked, [_share_of_extreme(q.candidates, extreme) for q in asked])
            num_right = math.floor(sum(hits) + 1e-9)
            test = stats.binomtest(num_right, num_clusters, chance, alternative="greater")
            if test.pvalue < LENGTH_P_VALUE:
                text = (
                    f"who always picks the {name} candidate{client.whose(file)} is right for "
                    f"{100 * statistics.fmean(hits):.0f} % of {num_clusters} facts (n = "
                    f"{len(asked)} questions); chance is {100 * chance:.0f} %. Give the records "
                    '"distractors" (wrong answers) of the same length.'
                )
                yield file.finding("warning", "telling-length", None, text)


def _find_frequent_words(questions: Sequence[Question], words: frozenset[str]) -> frozenset[str]:
    """Return the words that right answers have clearly more often than wrong ones.

    What any answer may say ("can", "office"; of Chinese also pairs of characters that are no word)
    tells nothing, wherever it happens to stand in a right answer alone.
    """
    rights: Counter[str] = Counter()
    wrongs: Counter[str] = Counter()
    num_wrong = 0
    for question in questions:
        right, *wrong = _candidate_words(question)
        rights.update(right & words)
        num_wrong += len(wrong)
        for candidate in wrong:
            wrongs.update(candidate & words)
    return frozenset(
        word
        for word, count in rights.items()
        if count * num_wrong > CLEARLY_MORE * wrongs[word] * len(questions)
    )


def _candidate_words(question: Question) -> list[frozenset[str]]:
    """Return the content words of each candidate; of the keywords where there are none."""
    if question.candidates:
        return [content_words(candidate) for candidate in question.candidates]
    return [
        frozenset().union(*map(content_words, keywords))
        for keywords in (question.own_keywords, question.other_keywords)
    ]


def _share_of_extreme(candidates: Sequence[str], extreme: Callable[[list[int]], int]) -> float:
    """Return the right answer's chance among the longest (or shortest), which may be several."""
    sizes = [len(candidate.encode()) for candidate in candidates]
    best = extreme(sizes)
    return 1 / sizes.count(best) if sizes[0] == best else 0.0


def _cluster_means(questions: Sequence[Question], values: Sequence[float]) -> list[float]:
    clusters: dict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        clusters[question.cluster].append(value)
    return [sum(members) / len(members) for members in clusters.values()]
