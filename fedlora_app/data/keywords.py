"""The keyword rule: an answer passes with an own keyword in it and none of the others'.

Kept for data that bring nothing better, and always shown beside its ceiling, the share of
*gold* answers that pass. Three traps of the plain substring rule are avoided: a keyword inside a
longer one (可以 in 不可以) counts as the longer one only, one inside another word ("fine" in
"define") not at all, and neither does a negated one ("no fine", 不可以).

A negation governs what follows it in its clause: in English across function words and at most
one other word, in Chinese across the verbs and particles of ``LINK``. "Not only", 不仅 and a
double negation (不得不, "not without") negate nothing. What the rule does not see: a negation
after the keyword ("fines do not apply"), the second item of a list with commas, and inflected
forms, which are keywords of their own ("fine", "fines").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

# Scripts that set no spaces between words, or add particles to them.
UNSPACED = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)

MAX_WORDS_BETWEEN = 1
NEGATION = re.compile(r"not|no|never|without|neither|nor|cannot|none|nothing|nobody|\w+n['’]t")
NEGATING_PHRASE = re.compile(r"\b(?:instead of|rather than|exempt(?:ed)? from|free (?:of|from))\b")
NOT_NEGATING = re.compile(
    r"(?:\bnot|n['’]t|\bno)\s+(?:only|just|merely|simply|solely|(?:less|fewer|more|later) than)\b"
    r"|\bnothing (?:but|except|less than)\b|\bno doubt\b|\bwhether or not\b"
    r"|\bwithout (?:a )?(?:doubt|fail|exception|question)\b"
    r"|(?:\b(?:not|no|never|nobody|cannot)|n['’]t)(?:\s+\w+){0,2}\s+without\b"
)
FUNCTION_WORD = re.compile(
    r"an?|the|any|this|that|these|those|such|kind|sort|of|for|to|with|by|in|on|at|as|or"
    r"|your|our|my|his|her|its|their|you|we|they|it|be|been|being|is|are|was|were|do|does|did"
    r"|have|has|had|will|would|can|could|may|might|must|shall|should|needs?|required|asked"
    r"|obliged|supposed|expected|going|able|allowed|permitted|longer|ever|yet"
)
CLAUSE_END = re.compile(
    r"[;!?。…()\[\]\n—–]|[.,:](?!\d)|\s-\s"
    r"|\b(?:and|but|however|although|though|while|whereas|unless|except|if|when|until|because"
    r"|only|just|then|otherwise|else)\b|(?=\bnor\b)"
)

# The look-arounds keep out 特别, 分别, 除非, 非得, 出没, 没收, 难免 and their like. Words that only
# begin with such a character (未来, 非常, 无论, 不仅, 不过) need no entry: no LINK follows.
CHINESE_NEGATION = re.compile(
    r"[不无無未勿毋甭]"
    r"|(?<![出淹埋沉吞])[没沒](?!收)"
    r"|(?<![特分区區级級个個性差类類识識告鉴鑑辨派离離])[别別]"
    r"|(?<![除是莫])非(?![得要])|(?<=[并並绝絕而])非"
    r"|(?<![难難])免|禁止|[严嚴]禁|代替|替代|取消"
)
LINK = (
    r"(?:[会會被需要必须須应應该該能得再是有予以给給处處收取交缴繳纳納付受遭准可用法于於除开開让讓]"
    r"|任何|什[么麼]|允[许許]|支付|[进進]行|到|[实實]施|[征徵]收|[属屬][于於]|存在|包[括含]"
    r"|[对對][你您他她])"
)
CHINESE_CHAIN = re.compile(rf"(?:(?:{CHINESE_NEGATION.pattern})(?: *{LINK})* *)+$")
INSISTENCE = re.compile(r" *不[可行成](?!以)")  # 非罚款不可: a fine, and nothing else


def passes_keyword_rule(
    text: str, own: Sequence[str], others: Sequence[str], *, plain: bool = False
) -> bool:
    """Return whether ``text`` holds an own keyword and none of the others'.

    A keyword that both sides have therefore never helps, and fails the text that holds it.

    Args:
        plain: apply the bare substring rule, which knows neither negation nor words.
    """
    if plain:
        return any(word in text for word in own) and not any(word in text for word in others)
    found = find_keywords(text, [*own, *others])
    return bool(found & set(own)) and not found & set(others)


def find_keywords(text: str, keywords: Sequence[str]) -> set[str]:
    """Return the keywords that a text asserts; no part of it counts for two of them.

    Longer keywords come first. Width and case do not matter.
    """
    text = _normalise(text)
    spellings: dict[str, list[str]] = {}
    for keyword in keywords:
        spellings.setdefault(_normalise(keyword).strip(), []).append(keyword)
    taken = [False] * len(text)
    found: set[str] = set()
    for word in sorted(spellings, key=len, reverse=True):
        for start, end in _occurrences(text, word):
            if any(taken[start:end]):
                continue
            taken[start:end] = [True] * (end - start)
            if not _is_negated(text[:start], text[end:]):
                found.update(spellings[word])
    return found


def continues_word(character: str) -> bool:
    """Return whether a character is part of a word that spaces or signs set apart."""
    return unicodedata.category(character)[0] in "LMN" and not UNSPACED.match(character)


def split_words(text: str) -> list[str]:
    """Return the words of a text, case folded; scripts without spaces by the character."""
    words: list[str] = []
    is_open = False
    for character in unicodedata.normalize("NFKC", text).casefold():
        continues = continues_word(character)
        if continues and is_open:
            words[-1] += character
        elif continues or UNSPACED.match(character):
            words.append(character)
        is_open = continues
    return words


def _occurrences(text: str, word: str) -> Iterator[tuple[int, int]]:
    """Yield where a keyword stands for itself and not as a part of another word."""
    start = text.find(word) if word else -1
    while start >= 0:
        end = start + len(word)
        begins_inside = start > 0 and all(map(continues_word, text[start - 1 : start + 1]))
        ends_inside = end < len(text) and all(map(continues_word, text[end - 1 : end + 1]))
        if not begins_inside and not ends_inside:
            yield start, end
        start = text.find(word, start + 1)


def _is_negated(before: str, after: str) -> bool:
    return _is_negated_in_chinese(before, after) or _is_negated_in_english(before)


def _is_negated_in_chinese(before: str, after: str) -> bool:
    chain = CHINESE_CHAIN.search(before)
    if chain is None or (chain[0].startswith("非") and INSISTENCE.match(after)):
        return False
    negations = sum(1 for _ in CHINESE_NEGATION.finditer(before, chain.start()))
    return negations % 2 == 1


def _is_negated_in_english(before: str) -> bool:
    clause = CLAUSE_END.split(NOT_NEGATING.sub(" ", before))[-1]
    words_between = 0
    for word in reversed(NEGATING_PHRASE.sub("without", clause).split()):
        word = word.strip("\"'“”‘’«»*_")
        if NEGATION.fullmatch(word):
            return True
        words_between += FUNCTION_WORD.fullmatch(word) is None
        if words_between > MAX_WORDS_BETWEEN:
            return False
    return False


def _normalise(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
