"""A table of questions as people have them, imported, and the experiment that trains on it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from conftest import build_tiny_config

from fedlora_app.config.schema import Config
from fedlora_app.data.importing.importer import import_data
from fedlora_app.data.importing.settings import ImportSettings

CLIENTS = ("ann", "bob")


def import_table(project: Path) -> Config:
    """Import a table without facts and conflicts into ``project``; return the experiment."""
    table = project / "faq.csv"
    topics = ("red", "blue", "green", "black", "white", "brown")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "city"])
        for city in (*CLIENTS, ""):
            for topic in topics:
                asks = f"Who opens the {topic} office{f' of {city}' if city else ''}?"
                writer.writerow([asks, f"The {topic} one.", city])
    import_data(
        str(table), project / "faq", ImportSettings(client_column="city", test=0.3), root=project
    )
    raw = json.loads(json.dumps(build_tiny_config().dump()))
    raw["federated"]["clients"] = [
        {
            "id": client,
            "system_prompt": f"You are {client}.",
            "local_train": f"faq/{client}/local_train.json",
            "local_test": f"faq/{client}/local_test.json",
        }
        for client in CLIENTS
    ]
    raw["federated"]["num_rounds"] = 1
    raw["data"] |= {
        "universal_train": "faq/universal_train.json",
        "universal_test": "faq/universal_test.json",
        "conflict_test": None,
    }
    return Config.model_validate(raw)
