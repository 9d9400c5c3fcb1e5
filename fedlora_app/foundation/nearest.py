"""What may have been meant where a file or folder is missing."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

MAX_NAMES_SHOWN = 8


def describe_nearest(path: Path) -> str:
    """Return a sentence about what is there in the place of a missing file; "" if nothing is."""
    missing = next((p for p in (path, *path.parents) if p.parent.is_dir()), path)
    if missing.exists():
        return ""
    folder = missing.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
    except OSError:
        return ""
    near = get_close_matches(missing.name, names, n=1)
    if near:
        return f" Did you mean {folder / near[0]}?"
    what = f"{folder} has" if missing == path else f"There is no folder {missing}; {folder} has"
    listed = ", ".join(names[:MAX_NAMES_SHOWN])
    return f" {what}: {listed}{', ...' * (len(names) > MAX_NAMES_SHOWN)}." if names else ""
