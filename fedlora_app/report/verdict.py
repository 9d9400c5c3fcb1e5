"""What came out, in one sentence with its numbers, and no more than they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_app.evaluation.comparison import compare_evaluations
from fedlora_app.evaluation.intervals import Estimate, over_seeds
from fedlora_app.report.figures import RANKED, Figures

BOTH = "global+local:own"
PASSES = "conflict_pass_rate_exact_match"
SAME_PROMPT = (
    "All clients have the same system prompt, so any one adapter for all would give all of them "
    "the same answer, however it was trained: it can pass no conflict question."
)
OTHER_PROMPTS = (
    "The shared adapter was trained on universal data alone. How one adapter does that was trained "
    "on everything and averaged, a run with mode='fedavg' tells."
)
AGREEMENT = (
    "The interval over several runs is Student's t, that of one run Wilson's. Where all runs agree "
    "it has no width, which is no certainty."
)


@dataclass(frozen=True)
class Verdict:
    """A headline, the sentence that carries the numbers, and what it does not say."""

    headline: str
    sentence: str
    caveats: tuple[str, ...] = ()


def judge_run(figures: Mapping[str, Figures], prompts: Sequence[str]) -> Verdict:
    """Judge one run by its conflict questions.

    Args:
        prompts: the clients' system prompts.
    """
    own = next((figures[who] for who in (BOTH, "local:own", "global") if who in figures), None)
    if own is None or not own.passed().n:
        return Verdict(
            "No verdict.",
            "Nothing was measured on conflict questions that two or more clients answer: the run "
            "has none, or did not get that far.",
        )
    told = f"Every client gave its own answer, word for word, to {_count(own.passed())}"
    one = figures.get("global")
    if own.who != BOTH or one is None or not one.passed().n:
        what = {BOTH: "Two adapters", "local:own": "A local adapter alone"}.get(
            own.who, "One averaged adapter"
        )
        return Verdict(
            f"{what}: {_percent(own.passed())} of the conflicts.",
            f"{told}. {_ranked(own)}",
            ("How the other modes do on the same questions, runs with another mode tell.",),
        )
    universal = own.share("universal"), one.share("universal")
    knows = (
        f" Universal questions: {_brief(universal[0])} with both, {_brief(universal[1])} with the "
        "shared one alone."
        if universal[0].n and universal[1].n
        else ""
    )
    # Whatever it learns, one adapter says the same to clients that have the same prompt.
    is_any_other = len(set(prompts)) == 1
    rival = "one" if is_any_other else "the shared one alone"
    return Verdict(
        _headline(own.passed(), one.passed(), rival),
        f"{told} with both adapters, and to {_count(one.passed(), short=True)} with the shared one "
        f"alone.{knows}",
        (SAME_PROMPT if is_any_other else OTHER_PROMPTS, _ranked(own)),
    )


def judge_runs(
    figures: Mapping[str, Figures],
    modes: Mapping[str, str],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> Verdict:
    """Judge two adapters (mode dual) against one averaged adapter (mode fedavg).

    Args:
        figures: of each run what its clients answer with.
        evaluations: those runs' ``evaluation.json`` that have one.
    """
    measured = {name: f for name, f in figures.items() if f.passed().n}
    two = [name for name in measured if modes[name] == "dual"]
    one = [name for name in measured if modes[name] == "fedavg"]
    if not two or not one:
        return Verdict(
            "No verdict.",
            "To tell whether two adapters beat one, name at least one run of mode dual and one of "
            "mode fedavg, both with conflict questions.",
        )
    if len(two) == len(one) == 1 and {*two, *one} <= set(evaluations):
        return _judge_pair(two[0], one[0], evaluations)
    many = {"two": [measured[n].passed().value for n in two]}
    many["one"] = [measured[n].passed().value for n in one]
    estimates = {
        key: over_seeds(values) if len(values) > 1 else measured[(two + one)[key == "one"]].passed()
        for key, values in many.items()
    }
    return Verdict(
        _headline(estimates["two"], estimates["one"]),
        f"Conflict questions that every client answered in its own way, word for word: "
        f"{_interval(estimates['two'])} with two adapters ({_runs(two)}), "
        f"{_interval(estimates['one'])} with one averaged adapter ({_runs(one)}).",
        (AGREEMENT,),
    )


def _judge_pair(two: str, one: str, evaluations: Mapping[str, Mapping[str, Any]]) -> Verdict:
    compared = compare_evaluations({one: dict(evaluations[one]), two: dict(evaluations[two])})
    entry = next((d for d in compared["differences"] if d["measure"] == PASSES), None)
    if entry is None:
        return Verdict(
            "No verdict.", "The two runs were not asked the same conflict questions.", ()
        )
    difference = Estimate(**entry["difference"])
    is_told = difference.low is not None and (difference.low > 0 or difference.high < 0)
    better = "beat" if is_told and difference.value > 0 else "do worse than"
    headline = (
        f"Two adapters {better} one averaged adapter."
        if is_told
        else "No difference between two adapters and one could be told."
    )
    passed = [Estimate(**evaluations[name]["summary"][PASSES]) for name in (two, one)]
    return Verdict(
        headline,
        f"Every client gave its own answer, word for word, to {_count(passed[0])} in {two} and to "
        f"{_count(passed[1], short=True)} in {one}. Difference over the same questions: "
        f"{_points(difference)} (p {format_p(entry['p_value'])}).",
        (*compared["not_comparable"], *compared["notes"]),
    )


def _headline(two: Estimate, one: Estimate, rival: str = "one") -> str:
    if None in (two.low, one.low):
        return "Too few runs for a verdict."
    if two.low > one.high:
        return f"Two adapters beat {rival}."
    if two.high < one.low:
        return f"Two adapters do worse than {rival}."
    return f"No difference between two adapters and {rival} could be told."


def _count(estimate: Estimate, short: bool = False) -> str:
    """Return "48 of 48 conflict questions (100 %, 95 % interval 93 to 100)"."""
    right = round(estimate.value * estimate.n)
    what = "" if short else " conflict questions"
    return (
        f"{right} of {estimate.n}{what} ({_interval(estimate)})"
        if not short
        else (f"{right} of {estimate.n}, {_brief(estimate)},")
    )


def _brief(estimate: Estimate) -> str:
    """Return "100 % (93 to 100)"."""
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{_percent(estimate)} ({low:.0f} to {high:.0f})"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None:
        return _percent(estimate)
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{_percent(estimate)}, 95 % interval {low:.0f} to {high:.0f}"


def _points(estimate: Estimate) -> str:
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:+.0f} points, 95 % interval {low:+.0f} to {high:+.0f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f} %"


def _ranked(figures: Figures) -> str:
    passed = figures.passed(RANKED)
    if not passed.n:
        return "By likelihood nothing was ranked."
    right = round(passed.value * passed.n)
    return f"By likelihood every client ranked its own answer first in {right} of {passed.n}."


def _runs(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} runs"


def format_p(p_value: float) -> str:
    """Return "0.016", or "below 0.001"."""
    return "below 0.001" if p_value < 0.001 else f"{p_value:.3f}"
