from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora_app.deployment.audit import read_log
from fedlora_app.deployment.evidence import Evidence, EvidenceError
from fedlora_app.deployment.record import EVIDENCE_VARIABLE, record

NUM_ENTRIES = 5


def write_log(path: Path, count: int = NUM_ENTRIES) -> bytes:
    path.unlink(missing_ok=True)
    for number in range(count):
        Evidence(path).add("sent", client="ann", round=number, bytes=7 * number, sha256_of="é\n")
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write_log(tmp_path_factory.mktemp("log") / "evidence.jsonl")


def test_a_log_is_a_chain_of_lines_that_only_its_owner_reads(tmp_path):
    path = tmp_path / "evidence.jsonl"
    write_log(path)
    log = read_log(path)
    assert (log.fault, log.notes) == (None, [])
    assert [entry["seq"] for entry in log.entries] == list(range(NUM_ENTRIES))
    assert log.entries[3]["round"] == 3 and log.entries[0]["previous"] == "0" * 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_log(path).head == log.head


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_byte_anywhere_is_found(whole, tmp_path, data):
    position = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[position]))
    path = tmp_path / "changed.jsonl"
    path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
    fault = read_log(path).fault
    assert fault is not None
    assert fault.line == whole[:position].count(b"\n") + 1


def test_every_byte_of_the_last_line_too(whole, tmp_path):
    """Nothing comes after it that would name its hash."""
    path = tmp_path / "changed.jsonl"
    start = whole[:-1].rindex(b"\n") + 1
    for position in range(start, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert read_log(path).fault.line == NUM_ENTRIES


def _removed(lines):
    return [*lines[:1], *lines[2:]]


def _swapped(lines):
    return [lines[0], lines[2], lines[1], *lines[3:]]


def _repeated(lines):
    return [*lines[:3], lines[1], *lines[3:]]


def _foreign(lines):
    return [*lines[:2], b'{"event":"sent"}', *lines[2:]]


def _made_anew(lines):
    """A line that was changed together with its own hash, as who knows the format can."""
    path = Path(os.environ["PYTEST_MADE_ANEW"])
    for number in range(2):
        Evidence(path).add("sent", client="bob", round=number)
    return [lines[0], path.read_bytes().splitlines()[1], *lines[2:]]


@pytest.mark.parametrize(
    ("change", "line", "what"),
    [
        (_removed, 2, "removed before it: entry 1"),
        (_swapped, 2, "lines were moved"),
        (_repeated, 4, "inserted or moved"),
        (_foreign, 3, "none of this log's"),
        (_made_anew, 2, "one of the two was replaced"),
        (lambda lines: lines[1:], 1, "removed before it: entry 0"),
        (lambda lines: [*lines[:-1], lines[-1][:-5]], NUM_ENTRIES, "it was changed"),
    ],
)
def test_the_first_line_that_is_wrong_is_named(whole, tmp_path, monkeypatch, change, line, what):
    monkeypatch.setenv("PYTEST_MADE_ANEW", str(tmp_path / "other.jsonl"))
    path = tmp_path / "changed.jsonl"
    path.write_bytes(b"".join(text + b"\n" for text in change(whole.splitlines())))
    log = read_log(path)
    assert log.fault.line == line and what in log.fault.what
    assert len(log.entries) == line - 1  # what follows is not relied on


@pytest.mark.parametrize("kept", [1, 40, -3])
def test_a_line_that_a_crash_tore_off_is_told_of_and_kept(whole, tmp_path, kept):
    path = tmp_path / "torn.jsonl"
    start = whole[:-1].rindex(b"\n") + 1
    torn = whole[start:][:kept]
    path.write_bytes(whole[:start] + torn)
    assert "not written to its end" in read_log(path).fault.what
    Evidence(path).add("sent", client="bob")
    Evidence(path).add("sent", client="cy")
    log = read_log(path)
    assert log.fault is None
    assert log.notes == [f"Line {NUM_ENTRIES} was torn off by a crash, as the log says."]
    assert [e["event"] for e in log.entries[-3:]] == ["torn", "sent", "sent"]
    assert path.read_bytes().startswith(whole[:start] + torn + b"\n")  # nothing is ever removed
    path.write_bytes(path.read_bytes().replace(torn + b"\n", b"", 1))
    assert "the torn line that it tells of was removed" in read_log(path).fault.what


def test_only_the_end_of_the_last_line_was_torn_off(whole, tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_bytes(whole[:-1])
    assert read_log(path).fault is not None
    Evidence(path).add("sent", client="bob")
    log = read_log(path)
    assert log.fault is None and len(log.entries) == NUM_ENTRIES + 1


def test_the_very_first_line_was_torn_off(tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_bytes(b'{"bytes"')
    Evidence(path).add("sent", client="bob")
    assert read_log(path).fault is None


def test_nothing_is_added_to_a_last_line_that_was_changed(whole, tmp_path):
    path = tmp_path / "changed.jsonl"
    for content in (whole[:-10] + b"x" + whole[-9:], whole[:-10] + b"x" + whole[-9:] + b'{"a'):
        path.write_bytes(content)
        with pytest.raises(EvidenceError, match="fedlora deploy audit"):
            Evidence(path).add("sent", client="bob")
        assert path.read_bytes() == content


def test_a_field_cannot_take_the_place_of_one_of_the_log_s_own(tmp_path):
    with pytest.raises(ValueError, match="seq, time"):
        Evidence(tmp_path / "log").add("sent", seq=3, time="never")
    with pytest.raises(ValueError):
        Evidence(tmp_path / "log").add("sent", loss=float("nan"))
    assert (tmp_path / "log").read_bytes() == b""


def test_a_log_is_never_written_through_a_link(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Evidence(tmp_path / "log").add("sent")
    assert not (tmp_path / "elsewhere").exists()


def test_processes_that_write_at_once_keep_one_chain(tmp_path):
    path = tmp_path / "evidence.jsonl"
    program = (
        "import sys; from pathlib import Path\n"
        "from fedlora_app.deployment.evidence import Evidence\n"
        "for n in range(60): Evidence(Path(sys.argv[1])).add('sent', client=sys.argv[2], n=n)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("a", "b")
    ]
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    log = read_log(path)
    assert log.fault is None
    for name in ("a", "b"):
        assert [e["n"] for e in log.entries if e["client"] == name] == list(range(60))


def test_without_a_deployment_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(EVIDENCE_VARIABLE, raising=False)
    record("sent", client="ann")
    monkeypatch.setenv(EVIDENCE_VARIABLE, str(tmp_path / "log"))
    record("sent", client="ann")
    assert json.loads((tmp_path / "log").read_text())["client"] == "ann"
