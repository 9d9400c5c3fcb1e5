"""The JSON schema of an experiment's YAML, which editors check and complete by.

    python -m fedlora_app.config.json_schema      # writes conf/schema.json

A YAML in ``conf/`` names it in its first line: ``# yaml-language-server: $schema=schema.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora_app.config.schema import Config

SCHEMA_FILE = Path("conf", "schema.json")


def build_json_schema() -> dict[str, Any]:
    """Return the schema of ``Config`` under the names that a YAML uses."""
    schema = Config.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def main() -> None:
    """Write the schema into the checkout in the working directory."""
    text = json.dumps(build_json_schema(), indent=1, ensure_ascii=False)
    SCHEMA_FILE.write_text(text + "\n", encoding="utf-8")
    print(f"Written: {SCHEMA_FILE}")


if __name__ == "__main__":
    main()
