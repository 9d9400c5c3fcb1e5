"""At installation: note where this checkout lies, so that ``flwr run .`` finds it again.

``flwr run`` hands a copy of the package to a daemon that may have been started from any
folder, so neither the code's own location nor the working directory leads back to the
data. Hatchling runs this hook during ``pip install -e .``; the note travels in the bundle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CheckoutNoteHook(BuildHookInterface):
    """Write ``fedlora_app/checkout.json`` for editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; ``version`` is "editable" or "standard"."""
        if version == "editable":
            note = Path(self.root, "fedlora_app", "checkout.json")
            note.write_text(json.dumps({"root": self.root}) + "\n", encoding="utf-8")
