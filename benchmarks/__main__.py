"""What a federation costs: measure, print a table and keep the figures in ``results``.

``python -m benchmarks all`` runs everything that suits this machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
RECORDED_PACKAGES = ("flwr", "torch", "transformers", "peft", "bitsandbytes")
DEMO_MODEL = "data/demo/base_model"
OF_ALL = (
    "loads",
    "overhead",
    "warm",
    "step",
    "layers",
    "packing",
    "loss",
    "bytes",
    "evaluation",
    "leaving",
    "gate",
    "poison",
    "large",
    "capacity",
    "gpu",
)

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Turns = Annotated[int, typer.Option(min=1, help="Pairs of turns; 5 or more for a figure.")]


@app.command()
def loads(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    clients: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """How often a run loads the base model, in the clients' process and in the server's."""
    from benchmarks.loads import describe, measure

    _finish("loads", measure(rounds, clients), describe)


@app.command()
def overhead(
    phase_seconds: Annotated[float, typer.Option(help="How long a phase is to train.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=2)] = 3,
    turns: Turns = 5,
) -> None:
    """What a round takes beside its training, and what loading the base anew would take."""
    from benchmarks.overhead import describe, measure

    _finish("overhead", measure(phase_seconds, rounds, turns), describe)


@app.command()
def warm(
    base: Annotated[str, typer.Option(help="A base model's folder; random weights if empty.")] = "",
    gigabytes: Annotated[float, typer.Option(min=0.01, help="Of random weights, in fp32.")] = 1.0,
    turns: Turns = 5,
) -> None:
    """What a message costs at a site: a process for each against one that stays."""
    from benchmarks.warm_client import describe, measure

    _finish(
        f"warm-{Path(base).name}" if base else "warm", measure(base, gigabytes, turns), describe
    )


@app.command()
def step(
    turns: Turns = 9,
    examples: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens of an example.")] = 200,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 16,
) -> None:
    """A step with two adapters against transformers' Trainer with PEFT and one."""
    from benchmarks.step import describe, measure

    _finish("step", measure(turns, examples, length, rank), describe)


@app.command()
def layers(
    turns: Annotated[int, typer.Option(min=1)] = 3,
    passes: Annotated[int, typer.Option(min=2, help="Over the examples, a step each.")] = 5,
    examples: Annotated[int, typer.Option(min=1)] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 8,
) -> None:
    """A step with adapters on the upper layers only, in fp32 and bf16, on one thread."""
    from benchmarks.layers import describe, measure

    _finish("layers", measure(turns, passes, examples, rank), describe)


@app.command()
def packing(
    turns: Turns = 5,
    examples: Annotated[int, typer.Option(min=8, help="A multiple of 8.")] = 16,
    limit: Annotated[int, typer.Option(min=16, help="Tokens that the limit allows.")] = 1024,
) -> None:
    """Real tokens a second: packed, padded to the longest, padded to the limit."""
    from benchmarks.padding import describe, measure

    _finish("packing", measure(turns, examples, limit=limit), describe)


@app.command()
def loss(
    positions: Annotated[int, typer.Option(min=1, help="Answer positions.")] = 1024,
    vocabulary: Annotated[int, typer.Option(min=2)] = 152_064,
) -> None:
    """Peak memory of the loss: full logits against ours."""
    from benchmarks.loss_memory import describe, measure

    _finish("loss", measure(positions, vocabulary=vocabulary), describe)


@app.command("bytes")
def bytes_(
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    rank: Annotated[int, typer.Option(min=1, help="Of the counted run's adapter.")] = 128,
) -> None:
    """Bytes that travel per client and round, over the least that could."""
    from benchmarks.traffic import describe, measure

    _finish("bytes", measure(rounds, rank), describe)


@app.command()
def evaluation(
    turns: Turns = 5,
    questions: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Answers a second: batched evaluation against one answer at a time."""
    from benchmarks.evaluation import describe, measure

    _finish("evaluation", measure(turns, questions), describe)


@app.command()
def leaving(
    turns: Turns = 5,
    prompts: Annotated[int, typer.Option(min=2, help="In one batch.")] = 32,
) -> None:
    """A batch's greedy answers, where those that have ended leave it and where they stay."""
    from benchmarks.leaving import describe, measure

    _finish("leaving", measure(turns, prompts), describe)


@app.command()
def gate(
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = DEMO_MODEL,
    splits: Annotated[int, typer.Option(min=1, help="Choices of topics.")] = 4,
) -> None:
    """What the gate before the local adapter opens for, where questions are alike."""
    from benchmarks.gate import describe, measure

    result = measure(model, splits, ROOT)
    _finish(f"gate-{result['model']}", result, describe)


@app.command()
def survival(
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = DEMO_MODEL,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float, typer.Option()] = 2e-3,
    draws: Annotated[int, typer.Option(min=1, help="Of records.")] = 5,
) -> None:
    """What of a batch is left in an update, from one gradient to a hundred optimizer steps."""
    from benchmarks.survival import describe, measure

    result = measure(model, rank, learning_rate, draws, ROOT)
    _finish(f"survival-{result['model']}", result, describe)


@app.command()
def privacy(
    runs: Annotated[list[Path], typer.Argument(help="Attacked runs, <setting>-seed<N>.")],
) -> None:
    """What attacks reach under each setting: a table of runs that fedlora attack was tried on."""
    from benchmarks.privacy import describe, measure

    with _telling_the_user():
        figures = measure(runs)
    _finish("privacy", figures, describe)


@app.command()
def poison(
    rounds: Annotated[int, typer.Option(min=2)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of a client in a round.")] = 20,
) -> None:
    """What a client that sends poison does to the global adapter, under rules and bounds."""
    from benchmarks.poison import describe, measure

    _finish("poison", measure(rounds, steps), describe)


@app.command()
def long(
    rounds: Annotated[int, typer.Option(min=40)] = 200,
    every: Annotated[int, typer.Option(min=1, help="Rounds from one sample to the next.")] = 10,
) -> None:
    """Memory, file handles, threads and processes of server and client over many rounds."""
    from benchmarks.long_run import describe, measure

    _finish("long", measure(rounds, every), describe)


@app.command()
def large(
    clients: Annotated[list[int], typer.Option(min=1)] = [10, 100, 1000],  # noqa: B006
    large_clients: Annotated[
        list[int], typer.Option(min=1, help="The same for the 40 MB adapter.")
    ] = [10, 100, 1000],  # noqa: B006
) -> None:
    """The strategy's memory and time with many clients, for a tiny adapter and one of 40 MB."""
    from benchmarks.many_clients import describe, measure

    _finish("large", measure({"tiny": clients, "40 MB": large_clients}), describe)


@app.command()
def capacity(
    repeats: Annotated[int, typer.Option(min=2, help="Of which the least time counts.")] = 5,
    clients: Annotated[list[int], typer.Option(min=1)] = [10, 100, 1000],  # noqa: B006
) -> None:
    """What an update of a 7B model costs server and store, and what many clients' records do."""
    from benchmarks.capacity import describe, measure

    _finish("capacity", measure(repeats, clients=tuple(clients)), describe)


@app.command()
def gpu(
    config: Annotated[
        list[str] | None,
        typer.Option(help="An experiment whose settings are measured. Default: both Qwen2.5-7B."),
    ] = None,
    cap: Annotated[
        str | None,
        typer.Option(help="What torch may allocate for it. Default: 7.0GiB for the 8 GB one."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    shape: Annotated[str, typer.Option(help="7b or tiny.")] = "7b",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a phase.")] = 4,
) -> None:
    """Training of a model of Qwen2.5-7B's shape on a GPU: speed, memory, loading."""
    from benchmarks.gpu import choose_runs, describe, measure

    with _telling_the_user():
        figures = measure(choose_runs(config, cap), device, shape, steps)
    if (device, shape) == ("cuda", "7b"):
        _finish("gpu", figures, describe)
    else:
        print(f"\n{describe(figures)}\n\nA trial; these figures are not kept.")


@app.command("all")
def all_(
    with_long: Annotated[
        bool, typer.Option(help="Also the run over 200 rounds, some four minutes.")
    ] = False,
) -> None:
    """Everything that suits this machine, each in a fresh process; about 45 minutes."""
    import torch

    names = [*OF_ALL, *(["long"] if with_long else [])]
    if not with_long:
        print("long is left out; --with-long adds it.")
    if not torch.cuda.is_available():
        names.remove("gpu")
        print("gpu is left out: torch sees no CUDA device.")
    failed = []
    for name in names:
        print(f"\n## {name}\n", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "benchmarks", name], cwd=ROOT, check=False)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode != 0:
            failed.append(name)
    if failed:
        typer.echo(f"These failed: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


@contextmanager
def _telling_the_user() -> Iterator[None]:
    """End with status 2 and a sentence where it is the user who can mend it."""
    from fedlora_app.foundation.errors import UserError

    try:
        yield
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def _finish(name: str, figures: dict[str, Any], describe: Any) -> None:
    print(f"\n{describe(figures)}\n")
    _keep(name, figures)


def _keep(name: str, figures: dict[str, Any]) -> None:
    import torch

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    about = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_15_minutes": round(os.getloadavg()[2], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in RECORDED_PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(about | figures, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    app()
