"""How questions are worded: when two ask the same thing, what they are about, in which script.

Input: texts of any language. It knows nothing of files or clients.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache

from rapidfuzz import fuzz, process

NEAR_DUPLICATE_RATIO = 85  # percent of the characters of both questions
SPELLING_RATIO = 80  # percent; above it two words may be one word's forms or a slip of the pen
SPELLING_MIN_LENGTH = 4
SPELLING_START = 2  # letters in which such words agree, unlike "legal" and "illegal"
NEAR_CANDIDATES = 20  # most similar training questions looked at per question
MIN_KANA_SHARE = 0.1  # of the Chinese characters and kana of a Japanese text
SHORT_HAN_TEXT = 10  # letters; a Japanese name or term may be this long without any kana
CJK_WEIGHT = 3  # letters of an alphabet that a Chinese character or kana stands for
CACHED_TEXTS = 20_000
CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_RUN = re.compile(f"[{CJK}]+")
HIRAGANA_ONLY = re.compile(r"[\u3040-\u309f]+")
TOKEN = re.compile(f"[{CJK}]|[^\\s{CJK}]+")
SPACED_WORD = re.compile(f"[^\\s{CJK}]+")
NUMBER = re.compile(r"\d+")
CJK_GAP = re.compile(f"(?<=[{CJK}]) | (?=[{CJK}])")
MINUS_SIGN = re.compile(r"(?<!\w)[-\u2212](?=\d)")
SENTENCE_PUNCTUATION = r"""[.,;:!?'"`…、。·()\[\]{}«»‹›“”„‘’「」『』《》【】¡¿]"""
# Punctuation by Unicode's categories that is part of what is asked ("50 %", "C#", "R&D").
MEANINGFUL_PUNCTUATION = frozenset("%‰#&@*/")
# Words that say nothing about the matter. Negations are not among them: they turn an answer.
FILLER_WORDS = """
a about am an and any are as at be been by did do does for from had has have he her here him
his i if in into is it its me my of on or our please she so tell than that the their them then
there these they this those to us was we were with you your s ll re ve
als am an auf aus bei bitte das dem den der des die ein eine einem einen einer es für ich ihr
im in ist man mit oder sein sich sie sind und von zu zum zur
au aux avec ce ces dans de des du elle en est et il ils je la le les leur par pour sa se ses
son sont sur un une vous
al con de del el ella en es esta este la las le lo los más o para por se ser son su sus un y
"""
# Nothing about the matter either, but two questions that differ in one ask different things.
ASKING_WORDS = """
can could how may might must shall should what when where which who whom whose why will would
kann wann warum was welche welcher welches wer wie wird wo
comment où pourquoi quand que quel quelle qui quoi
como cómo cuál cuándo dónde por qué que quién
"""
FILLERS = frozenset(FILLER_WORDS.split())
STOP_WORDS = FILLERS | frozenset(ASKING_WORDS.split())
FILLER_CHARACTERS = frozenset(
    "的了吗嗎呢啊吧呀嘛请請问問您你我们們是在就都也和与與及之所对對为為这這那个個"
)


def normalise_question(text: str) -> str:
    """Return the text for comparison: NFKC, case folded, without punctuation.

    Spaces beside Chinese characters and kana go as well: whether a comma stood there must not
    matter. A text of nothing but punctuation stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    signed = MINUS_SIGN.sub("\u2212", folded)  # category Sm, unlike the hyphen
    words = "".join(map(_blank_punctuation, signed)).split()
    return CJK_GAP.sub("", " ".join(words)) or folded.strip()


@lru_cache(maxsize=CACHED_TEXTS)
def normalise_answer(text: str) -> str:
    """Return the text for comparison: NFKC, case folded, without sentence punctuation.

    Signs that carry meaning (minus, percent, currencies) and combining marks stay.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(SENTENCE_PUNCTUATION, " ", folded).split())


@lru_cache(maxsize=CACHED_TEXTS)
def content_words(text: str) -> frozenset[str]:
    """Return the words that say something; of Chinese and Japanese the character pairs."""
    folded = normalise_question(text)
    words = {word for word in SPACED_WORD.findall(folded) if word not in STOP_WORDS}
    for run in CJK_RUN.findall(folded):
        pairs = [run[i : i + 2] for i in range(max(1, len(run) - 1))]
        words |= {
            pair
            for pair in pairs
            if not HIRAGANA_ONLY.fullmatch(pair) and not FILLER_CHARACTERS.issuperset(pair)
        }
    return frozenset(words)


@lru_cache(maxsize=CACHED_TEXTS)
def dominant_script(text: str) -> str | None:
    """Return the script of most of a text (Latin, Han, Kana, Cyrillic, ...), None if none is.

    Chinese characters among kana are Japanese and count as Kana.
    """
    letters = unicodedata.normalize("NFKC", text)
    counts = Counter(filter(None, map(_script, letters)))
    japanese = counts["Han"] + counts["Kana"]
    if japanese and counts["Kana"] >= MIN_KANA_SHARE * japanese:
        counts["Kana"], counts["Han"] = japanese, 0
    for script in ("Han", "Kana"):
        counts[script] *= CJK_WEIGHT
    return max(counts, key=counts.__getitem__) if counts.total() else None


def match_nearly(ones: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield questions with the most similar of the others that asks the same.

    Similar is what shares 85 % of the characters, words in their order or sorted: Chinese has
    no words to sort, and a slip of the pen is a character anywhere. Asking the same is having
    the same numbers and words but for fillers and spelling. Without that, one phrasing about
    two matters ("a dog licence", "a cat licence") would pass for a copy.
    """
    blocks: dict[frozenset[str], list[str]] = defaultdict(list)
    for other in others:
        blocks[_outline(other)].append(other)
    for one in ones:
        block = blocks.get(_outline(one), [])
        similar = _find_similar(one, block) if block else {}
        twin = next((other for other in similar if _asks_the_same(one, other)), None)
        if twin is not None:
            yield one, twin


def group_nearly(questions: Iterable[str]) -> Iterator[list[str]]:
    """Yield the distinct questions in groups, each with all that ask nearly the same.

    Goes from question to question: one that ``match_nearly`` would pair with any of a group
    belongs to it, however unlike the others it is.
    """
    blocks: dict[tuple[frozenset[str], tuple[str, ...]], list[str]] = defaultdict(list)
    for question in dict.fromkeys(questions):
        blocks[_outline(question), _find_numbers(question)].append(question)
    for left in blocks.values():
        while left:
            group = [left.pop(0)]
            for one in group:  # which grows meanwhile
                similar = _find_similar(one, left, limit=None) if left else {}
                twins = {other for other in similar if _asks_the_same(one, other)}
                group += [other for other in left if other in twins]
                left = [other for other in left if other not in twins]
            yield group


@lru_cache(maxsize=CACHED_TEXTS)
def _outline(text: str) -> frozenset[str]:
    """Return what two questions that ask the same must have in common, for a quick search."""
    tokens = [token for token in TOKEN.findall(text) if not _is_filler(token)]
    return frozenset(t[:SPELLING_START] if len(t) >= SPELLING_MIN_LENGTH else t for t in tokens)


def _find_similar(
    text: str, others: Sequence[str], limit: int | None = NEAR_CANDIDATES
) -> dict[str, float]:
    """Return the most similar of the others with their percentages, best first."""
    best: dict[str, float] = {}
    for arrange in (str, _sort_words):
        found = process.extract(
            arrange(text),
            [arrange(other) for other in others],
            scorer=fuzz.ratio,
            score_cutoff=NEAR_DUPLICATE_RATIO,
            limit=limit,
        )
        for _, percentage, index in found:
            best[others[index]] = max(percentage, best.get(others[index], 0))
    return dict(sorted(best.items(), key=lambda item: -item[1]))


def _sort_words(text: str) -> str:
    return " ".join(sorted(text.split()))


def _asks_the_same(one: str, other: str) -> bool:
    """Return whether two questions differ in fillers and spelling only."""
    if _find_numbers(one) != _find_numbers(other):
        return False
    ones, others = _count_tokens(one), _count_tokens(other)
    only_one, only_other = list(ones - others), list(others - ones)
    return all(_is_filler(w) or _has_variant(w, only_other) for w in only_one) and all(
        _is_filler(w) or _has_variant(w, only_one) for w in only_other
    )


@lru_cache(maxsize=CACHED_TEXTS)
def _find_numbers(text: str) -> tuple[str, ...]:
    return tuple(sorted(NUMBER.findall(text)))


@lru_cache(maxsize=CACHED_TEXTS)
def _count_tokens(text: str) -> Counter[str]:
    return Counter(TOKEN.findall(text))


def _is_filler(token: str) -> bool:
    return token in FILLERS or token in FILLER_CHARACTERS


def _has_variant(word: str, others: Iterable[str]) -> bool:
    """Return whether a spelling of the word is among others."""
    return len(word) >= SPELLING_MIN_LENGTH and any(
        fuzz.ratio(word, other) >= SPELLING_RATIO for other in others
    )


@cache
def _blank_punctuation(character: str) -> str:
    is_punctuation = unicodedata.category(character).startswith("P")
    return " " if is_punctuation and character not in MEANINGFUL_PUNCTUATION else character


@cache
def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    name = re.split(r"[ -]", unicodedata.name(character, "MODIFIER"))[0]
    named = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
    return None if name == "MODIFIER" else named.get(name, name.title())


def most_common(scripts: Iterable[str | None]) -> str | None:
    """Return the script that most texts have, None where none has one."""
    counts = Counter(filter(None, scripts)).most_common(1)
    return counts[0][0] if counts else None
