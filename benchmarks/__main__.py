"""``python -m benchmarks long`` and ``large``: measure, print a table and keep the figures."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
RECORDED_PACKAGES = ("flwr", "torch", "transformers", "peft")

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def long(
    rounds: Annotated[int, typer.Option(min=40)] = 200,
    every: Annotated[int, typer.Option(min=1, help="Rounds from one sample to the next.")] = 10,
) -> None:
    """Memory, file handles, threads and processes of server and client over many rounds."""
    from benchmarks.long_run import describe, measure

    figures = measure(rounds, every)
    print(describe(figures))
    _keep("long", figures)


@app.command()
def large(
    clients: Annotated[list[int], typer.Option(min=1)] = [10, 100, 1000],  # noqa: B006
    large_clients: Annotated[
        list[int], typer.Option(min=1, help="The same for the 40 MB adapter.")
    ] = [10, 40],  # noqa: B006
) -> None:
    """The strategy's memory and time with many clients, for a tiny adapter and one of 40 MB."""
    from benchmarks.many_clients import describe, measure

    figures = measure({"tiny": clients, "40 MB": large_clients})
    print(describe(figures))
    _keep("large", figures)


def _keep(name: str, figures: dict[str, Any]) -> None:
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
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
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
