"""Write the benchmark of countries.

python -m fedlora_app.demo.countries --countries DE FR JP BR --output data/countries
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from fedlora_app.data.importing.experiment import EXPERIMENT_FILE
from fedlora_app.demo.countries.card import build_card, build_experiment, dump_yaml
from fedlora_app.demo.countries.facts import MIN_CONFLICTS
from fedlora_app.demo.countries.sets import Benchmark, check_countries, generate_countries
from fedlora_app.demo.countries.states import generate_states
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import find_project_root

BASE = "conf/countries-smollm2.yaml"
"""The experiment that other sets' follow in all but clients and data."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m fedlora_app.demo.countries")
    clients = parser.add_mutually_exclusive_group(required=True)
    clients.add_argument("--countries", nargs="+", metavar="CODE", help="two or more clients")
    clients.add_argument("--states", metavar="CODE", help="the states of one country: DE or US")
    parser.add_argument(
        "--entangled",
        action="store_true",
        help="local and universal questions differ in a country's name only",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    if options.entangled and options.states:
        parser.error("--entangled goes with --countries only")
    try:
        if options.states:
            benchmark = generate_states(options.states)
        else:
            codes = check_countries(options.countries)
            benchmark = generate_countries(codes, is_entangled=options.entangled)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write(benchmark, options.output)
    if (found := len(benchmark.partition.conflicts)) < MIN_CONFLICTS:
        print(f"Only {found} conflict facts, fewer than {MIN_CONFLICTS}: the clients are alike.")
    return 0


def render(benchmark: Benchmark, folder: PurePosixPath) -> dict[str, str]:
    """Return the text of every file, by its path below the folder."""
    texts = {
        name: json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        for name, records in benchmark.files.items()
    }
    texts["README.md"] = build_card(
        benchmark.description, benchmark.files, benchmark.partition, benchmark.ids, folder
    )
    base = yaml.safe_load((find_project_root() / BASE).read_text(encoding="utf-8"))
    own = build_experiment(benchmark.files, benchmark.ids, folder)
    federated = base["federated"] | own["federated"]
    experiment = base | {"experiment": {"name": folder.name}, **own, "federated": federated}
    if federated != base["federated"]:  # the four committed countries', which BASE is already
        texts[EXPERIMENT_FILE] = dump_yaml(experiment)
    return texts


def write(benchmark: Benchmark, folder: Path) -> None:
    """Write every file below the folder."""
    for name, text in render(benchmark, PurePosixPath(folder.as_posix())).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        records = benchmark.files.get(name)
        print(f"{path}: {len(records)} records" if records else path)


if __name__ == "__main__":
    sys.exit(main())
