"""What came out, in one sentence with its numbers, and no more than they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora_app.data.questions import UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.chance import describe_chance
from fedlora_app.evaluation.comparison import (
    Paired,
    compare_evaluations,
    pair_conflicts,
    pair_variants,
)
from fedlora_app.evaluation.evaluated_run import Evaluations, Variant, choose_pair, find_variants
from fedlora_app.evaluation.learning import NothingLearned
from fedlora_app.evaluation.names import OWN_PAIR, PASS_RATE, QUESTION_SETS
from fedlora_app.evaluation.statistics import Estimate, average_estimates
from fedlora_app.foundation.percent import PARENTHESES, format_percent
from fedlora_app.report.numbers import (
    EXACT,
    KEYWORD,
    KEYWORD_CEILING,
    PASS_KEYS,
    RANKED,
    Figures,
)
from fedlora_app.runs.reading import OWN_AVERAGES

BOTH = OWN_PAIR
INTERVAL = ", 95 % interval {low} to {high}"
LOSSES = {name: QUESTION_SETS[name].heading for name in (UNIVERSAL, UNIVERSAL_UNSEEN)}
SAME_PROMPT = (
    "All clients have the same system prompt, so any one adapter for all would give all of them "
    "the same answer, however it was trained: it can pass no conflict question."
)
TRAINED_ON = {
    "phased": "The shared adapter was trained on universal data alone. ",
    "mixed": "The shared adapter was trained on local data too. ",
    "joint": "The shared adapter was trained on local data too. ",
}
OTHER_MODES = (
    "How one adapter does that was trained on everything and averaged, a run with mode='fedavg' "
    "tells."
)
SEEDS = (
    "Over several runs an interval is the wider of two: Student's t over the seeds, and the one "
    "over facts, as if the seeds had added no questions."
)
NOTHING_MEASURED = (
    "Nothing was measured on conflict questions that two or more clients answer: the run has none, "
    "or did not get that far."
)
NEEDS_TWO = (
    "To tell whether two adapters beat one, name at least one run of mode dual and one of mode "
    "fedavg whose average is the same for all clients (federated.aggregation), both with conflict "
    "questions that have whole answers."
)


@dataclass(frozen=True)
class Verdict:
    """A headline, the sentence that carries the numbers, and what it does not say."""

    headline: str
    sentence: str
    caveats: tuple[str, ...] = ()


def judge_run(
    figures: Mapping[str, Figures],
    prompts: Sequence[str | None],
    schedule: str | None = None,
    nothing: NothingLearned | None = None,
    kind: str = "",
) -> Verdict:
    """Judge one run by its conflict questions, unless nothing was learned.

    Args:
        prompts: the clients' system prompts; None for one that is not known.
        schedule: how the adapters were trained, phased, mixed or joint; None where it is not known.
        nothing: that nothing was learned, where that was found.
        kind: the run's mode, or ``OWN_AVERAGES``.
    """
    own = next((figures[who] for who in (BOTH, "local:own", "global") if who in figures), None)
    if nothing is not None:
        passed = own is not None and own.passed().n
        told = f"Every client {_passes(own)} {_count(own.passed())}." if passed else ""
        caveats = (_other_measure(own),) if passed else ()
        return Verdict(nothing.headline, f"{nothing.sentence} {told}".strip(), caveats)
    if own is None or not own.passed().n:
        return _judge_keywords(own)
    one, is_own = figures.get("global"), kind == OWN_AVERAGES
    are_known = bool(prompts) and not {None, "None"} & set(prompts)
    are_equal = are_known and len(set(prompts)) == 1
    if own.who == BOTH and one is not None and one.passed().n:
        return _judge_shared(own, one, are_equal, TRAINED_ON.get(schedule, "") * are_known)
    one_adapter = "An averaged adapter of each client's own" if is_own else "One adapter"
    what = {BOTH: "Two adapters", "local:own": "A local adapter alone"}.get(own.who, one_adapter)
    if own.who == "local:own" and one is not None:  # in mode finetuned alone there are both
        what = "A fine-tuned copy of the average"
    fails = are_equal and own.who == "global" and not is_own and not own.passed().value
    return Verdict(
        f"{what}: {_percent(own.passed())} of the conflicts{_by_ranking(own)}.",
        f"Every client {_passes(own)} {_count(own.passed())}{_by_chance(own)}. "
        f"{_other_measure(own)}",
        (SAME_PROMPT,) * fails
        + ("How the other modes do on the same questions, runs with another mode tell.",),
    )


def _judge_keywords(own: Figures | None) -> Verdict:
    passed, ceiling = (own.passed(key) if own else None for key in (KEYWORD, KEYWORD_CEILING))
    if not passed or not passed.n:
        return Verdict("No verdict.", NOTHING_MEASURED)
    limit = (
        f"of the right answers in the files {_percent(ceiling, INTERVAL)} fit it, and no more can "
        "be asked."
        if ceiling.n
        else "the files hold no whole answers that would show what can be reached."
    )
    return Verdict(
        f"By keywords only: {_percent(passed)} of the answers fit.",
        "The conflict questions carry keywords and no whole answers, so nothing could be matched "
        "word for word or ranked. Of the answers to all questions with keywords, not to conflicts "
        f"alone, {_percent(passed, INTERVAL)} (n {passed.n}) fit the keyword rule; {limit}",
    )


def _judge_shared(own: Figures, one: Figures, are_equal: bool, trained_on: str) -> Verdict:
    """Judge both adapters against the shared one alone, which comes with every run of mode dual."""
    # Whatever it learns, one adapter says the same to clients that have the same prompt.
    fails = are_equal and bool(own.passed().value) and not one.passed().value
    paired = None if fails else pair_conflicts([(own.verdicts, one.verdicts)], own.facts)
    if fails:
        claim = f"Two adapters: {_percent(own.passed())} of the conflicts, where one adapter can "
        claim += f"reach none{_by_ranking(own)}"
    else:
        sign = paired.sign if paired else own.passed().differs_from(one.passed())
        claim = _claim(sign, "the shared one alone") + _by_ranking(own)
    shares = [{name: who.share(name) for name in LOSSES} for who in (own, one)]
    told = f"{_count(own.passed())} with both adapters, and {_to(own)}"
    told += f"{_count(one.passed(), True)} with"
    sentences = [
        f"Every client {_passes(own)} {told} the shared one alone{_by_chance(own)}.",
        *([_describe_paired(paired)] if paired else []),
        *_tell_shares(*shares, "with both", "with the shared one alone"),
    ]
    caveats = (SAME_PROMPT if fails else trained_on + OTHER_MODES, _other_measure(own))
    return Verdict(f"{claim}{_cost(*shares)}.", " ".join(sentences), caveats)


def judge_runs(
    figures: Mapping[str, Figures], modes: Mapping[str, str], evaluations: Evaluations
) -> Verdict:
    """Judge two adapters (mode dual) against one averaged adapter (mode fedavg).

    Only runs that are alike speak for a side: of one mode, size, settings and conditions.

    Args:
        figures: of each run what its clients answer with.
        modes: of each run, ``OWN_AVERAGES`` where fedavg leaves each client an average of its own.
        evaluations: those runs' ``evaluation.json`` that have one.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: an evaluation of another shape.
    """
    measured = [name for name, found in figures.items() if found.passed().n]
    sides = [[n for n in measured if modes[n] == mode] for mode in ("dual", "fedavg")]
    if not all(sides):
        return Verdict("No verdict.", NEEDS_TWO)
    names = [name for side in sides for name in side]
    groups = [find_variants(side, evaluations) for side in sides]
    variants = [variant for side in groups for variant in side]
    if not all(groups):
        reasons = _tell_left_out(names, variants, variants, evaluations)
        return Verdict("No verdict.", " ".join(reasons))
    two, one = choose_pair(*groups, evaluations)
    left_out = _tell_left_out(names, variants, [two, one], evaluations)
    return _judge_variants(two, one, figures, evaluations, tuple(left_out))


def _judge_variants(
    two: Variant,
    one: Variant,
    figures: Mapping[str, Figures],
    evaluations: Evaluations,
    left_out: tuple[str, ...],
) -> Verdict:
    """Judge like runs of each mode; by seed where both have the same ones."""
    seed = next((seed for seed in two if seed in one), None)
    first = [side.get(seed, next(iter(side.values()))) for side in (one, two)]
    compared = compare_evaluations({name: dict(evaluations[name]) for name in first})
    caveats = (*left_out, *compared["notes"])
    if compared["not_comparable"]:
        faults = " ".join(compared["not_comparable"])
        return Verdict("Not comparable.", f"{faults} The figures stand in the table.", caveats)
    passes = PASS_KEYS[figures[first[0]].leads()]
    entry = next((entry for entry in compared["differences"] if entry["measure"] == passes), None)
    if entry is None:
        return Verdict("No verdict.", "The runs have no conflict questions in common.", caveats)
    paired = pair_variants(two, one, evaluations)
    if len(two) == len(one) == 1:
        paired = Paired(Estimate(**entry["difference"]), entry["p_value"])
    verdict = _word_variants(two, one, figures, paired)
    notes = (SEEDS,) * (max(len(two), len(one)) > 1) + caveats
    prompts = set(evaluations[first[0]]["system_prompts"].values())
    reached = any(figures[name].passed().value for name in one.values())
    notes = (SAME_PROMPT,) * (len(prompts) == 1 and not reached) + notes
    return Verdict(*verdict, notes)


def _word_variants(
    two: Variant, one: Variant, figures: Mapping[str, Figures], paired: Paired | None
) -> tuple[str, str]:
    """Return headline and sentence."""
    sides = [[figures[name] for name in side.values()] for side in (two, one)]
    passed = [average_estimates([f.passed() for f in side]) for side in sides]
    shares = [
        {name: average_estimates([f.share(name) for f in side]) for name in LOSSES}
        for side in sides
    ]
    names = [_list_names([*side.values()]) for side in (two, one)]
    sentences = [
        f"Every client {_passes(sides[0][0])} {_count(passed[0])} with two adapters "
        f"({names[0]}), and {_to(sides[0][0])}{_count(passed[1], short=True)} with one averaged "
        f"adapter ({names[1]}){_by_chance(sides[0][0])}.",
        *([_describe_paired(paired)] if paired else []),
        *_tell_shares(*shares, "with two", "with one"),
    ]
    sign = paired.sign if paired else passed[0].differs_from(passed[1])
    claim = _claim(sign, "one averaged adapter") + _by_ranking(sides[0][0])
    headline = f"{claim}{_cost(*shares)}."
    return headline, " ".join(sentences)


def _tell_left_out(
    names: Sequence[str],
    variants: Sequence[Variant],
    chosen: Sequence[Variant],
    evaluations: Evaluations,
) -> Iterator[str]:
    """Yield which of the runs have no part in the verdict, and why."""
    grouped = {name for variant in variants for name in variant.values()}
    compared = {name for variant in chosen for name in variant.values()}
    others = [name for name in names if name in grouped - compared]
    repeated = [name for name in names if name in evaluations and name not in grouped]
    unknown = [name for name in names if name not in evaluations]
    if others:
        yield (
            "Two variants are compared: comparable ones before others, then the most runs, then "
            f"the first given. Other variants stand in the table: {_list_names(others)}."
        )
    if repeated:
        yield f"Not counted, because a like run has the same seed: {_list_names(repeated)}."
    if unknown:
        yield (
            f"Not evaluated, so nothing tells what they are like: {_list_names(unknown)}. They "
            "count after: fedlora evaluate."
        )


def _list_names(names: Sequence[str], most: int = 3) -> str:
    """Return "a, b, c and 2 more"."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def _claim(sign: int, rival: str) -> str:
    if not sign:
        return f"No difference between two adapters and {rival} on conflict questions could be told"
    return f"Two adapters {'beat' if sign > 0 else 'do worse than'} {rival} on conflict questions"


def _cost(two: Mapping[str, Estimate], one: Mapping[str, Estimate]) -> str:
    """Return what two adapters lose beyond the intervals, for the headline."""
    lost = [
        f"{LOSSES[name]} {_percent(two[name])} instead of {_percent(one[name])}"
        for name in LOSSES
        if two[name].n and one[name].n and two[name].differs_from(one[name]) < 0
    ]
    return f", at a cost: {', '.join(lost)}" if lost else ""


def _tell_shares(
    two: Mapping[str, Estimate], one: Mapping[str, Estimate], with_two: str, with_one: str
) -> Iterator[str]:
    for name, label in LOSSES.items():
        if two[name].n and one[name].n:
            shares = [_percent(side[name], PARENTHESES) for side in (two, one)]
            lost = ", a loss beyond the intervals" * (two[name].differs_from(one[name]) < 0)
            yield (
                f"{label.capitalize()} questions: {shares[0]} {with_two}, "
                f"{shares[1]} {with_one}{lost}."
            )


def _count(estimate: Estimate, short: bool = False) -> str:
    """Return "48 of 48 conflict questions (100 %, 95 % interval 93 to 100)"."""
    right = f"{round(estimate.value * estimate.n, 1):g} of {estimate.n}"
    if short:
        return f"{right}, {_percent(estimate, PARENTHESES)},"
    about = f" about {estimate.facts} facts" * (estimate.facts is not None)
    return f"{right} conflict questions{about} ({_percent(estimate, INTERVAL)})"


def _percent(estimate: Estimate, interval: str = "", *, unit: str = " %", sign: str = "") -> str:
    ends = (estimate.value, estimate.low, estimate.high)
    return format_percent(*ends, digits=None, interval=interval, unit=unit, sign=sign)


def _describe_paired(paired: Paired) -> str:
    difference = _percent(paired.difference, INTERVAL, unit=" points", sign="+")
    p_value = f"sign-flip test over facts: p {format_p(paired.p_value)}"
    return f"Difference over the same questions: {difference} ({p_value})."


def _passes(figures: Figures) -> str:
    """Return what a client does to pass a conflict, before their number."""
    if figures.leads() == RANKED:
        return "ranked its own answer first in"
    return "gave its own answer, word for word, to"


def _to(figures: Figures) -> str:
    return "in " if figures.leads() == RANKED else "to "


def _by_chance(figures: Figures) -> str:
    """Return what guessing achieves where a sentence speaks of rankings."""
    is_ranked = figures.leads() == RANKED
    return describe_chance(figures.chances, PASS_RATE, lead="; by ") * is_ranked


def _by_ranking(figures: Figures) -> str:
    """Return by what a headline judges, where it is not word for word."""
    return " by likelihood, as most right answers are long or free" * (figures.leads() == RANKED)


def _other_measure(figures: Figures) -> str:
    """Return what stands beside the measure that leads."""
    is_ranked = figures.leads() == RANKED
    passed = figures.passed(EXACT if is_ranked else RANKED)
    if not passed.n:
        return "" if is_ranked else "By likelihood nothing was ranked."
    right = round(passed.value * passed.n)
    if is_ranked:
        return f"Word for word every client gave its own answer to {right} of {passed.n}."
    by_chance = describe_chance(figures.chances, PASS_RATE, lead=" (", end=")")
    told = f"By likelihood every client ranked its own answer first in {right} of {passed.n}"
    return f"{told}{by_chance}."


def format_p(p_value: float) -> str:
    """Return "0.016", or "below 0.001"."""
    return "below 0.001" if p_value < 0.001 else f"{p_value:.3f}"
