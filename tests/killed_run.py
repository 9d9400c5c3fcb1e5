"""A federation in a process of its own, for the kill test to kill.

Usage: python killed_run.py PROJECT OUTPUT_DIR KIND NUMBER. It begins the run, or goes on with it,
and kills its whole process group with SIGKILL at the NUMBER-th event of a KIND: ``file`` (something
is written below OUTPUT_DIR), ``message`` (a client has answered) or ``none``. Its last line holds
the numbers of events.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from conftest import build_tiny_config
from loopback import Federation

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def main() -> None:
    """Run until the end or the kill."""
    project, output_dir, kind, number = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    counts = {"file": 0, "message": 0}

    def count(what: str, detail: str) -> None:
        counts[what] += 1
        if what == kind and counts[what] == int(number):
            print(f"{what}: {detail}", flush=True)
            os.killpg(0, signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        if event in WATCHED and str(arguments[0]).startswith(str(output_dir)):
            is_read = event == "open" and not str(arguments[1] or "").strip("rbt")
            if not is_read or arguments[2] & (os.O_WRONLY | os.O_RDWR):
                count("file", f"{event} {Path(str(arguments[0])).relative_to(output_dir)}")

    def pass_on(message, reply):
        count("message", message.metadata.message_type)
        return reply

    sys.addaudithook(watch)
    federation = Federation(project, output_dir, build_tiny_config(evaluation={"interval": 1}))
    resume = {"resume": "run"} if (output_dir / "run").is_dir() else {}
    federation.run("run", tamper=pass_on, **resume)
    print(counts["file"], counts["message"], flush=True)


if __name__ == "__main__":
    main()
