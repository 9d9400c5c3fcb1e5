"""Broken input of every kind: it is accepted and then valid, or named in one of our errors.

Each property takes something real and breaks it. No example may end in another error, hang,
open a pickle or change a file.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import shutil
import stat
import tempfile
import time
import unicodedata
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import build_tiny_config, build_tiny_model
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedlora_app.config.loading import load_config, parse_config
from fedlora_app.config.schema import LOCAL, AdaptersConfig, Config, ConfigError
from fedlora_app.data.client_files import load_client_files, tokenize_client_files
from fedlora_app.data.records import DataError, load_conflicts, load_records
from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    ADAPTER_RECORD,
    METRIC_RECORD,
    TASK_RECORD,
    UPDATE_RECORD,
    MessageError,
    Task,
    read_task,
)
from fedlora_app.federation.packed_state import pack_state, unpack_state
from fedlora_app.federation.replies import read_reply
from fedlora_app.foundation.files import hash_file
from fedlora_app.model.adapter_files import load_adapter, save_adapter
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import attach_adapters, build_initial_state, state_shapes
from fedlora_app.model.base import ModelError
from fedlora_app.runs.paths import RunDirectoryError, check_run_name
from fedlora_app.runs.reading import load_run

OUR_ERRORS = (ConfigError, DataError, AdapterError, MessageError, ModelError, RunDirectoryError)
LONGEST_MESSAGE = 50_000
SLOWEST_SECONDS = 10.0
WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def for_all(number: int, **strategies):
    """Try 100 examples, and ``number`` of them in a slow test of the same name and _at_length."""

    def decorate(test):
        kept = {"deadline": None, "derandomize": True, "database": None}
        kept["suppress_health_check"] = list(HealthCheck)
        at_length = settings(max_examples=number, **kept)(given(**strategies)(test))
        globals()[f"{test.__name__}_at_length"] = pytest.mark.slow(at_length)
        return settings(max_examples=100, **kept)(given(**strategies)(test))

    return decorate


def attempt(call, *names):
    """Return what a call returns, None after one of our errors that holds one of the names."""
    started = time.monotonic()
    try:
        return call()
    except OUR_ERRORS as error:
        text = str(error)
        text.encode()  # it can be printed and sent
        assert len(text) < LONGEST_MESSAGE
        assert any(name in text for name in names), text
        return None
    finally:
        assert time.monotonic() - started < SLOWEST_SECONDS


def snapshot(folder: Path) -> dict[str, object]:
    """Return all that is in a folder: bytes of files, targets of links, kinds of the rest."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[str(path)] = os.readlink(path)
        elif stat.S_ISREG(mode):
            is_huge = path.lstat().st_size > 1 << 24
            found[str(path)] = path.lstat().st_size if is_huge else path.read_bytes()
        else:
            found[str(path)] = stat.S_IFMT(mode)
    return found


# Values and bytes that are wrong in many ways.

NASTY_TEXT = st.sampled_from(
    [
        *("", " ", "\0", "\ud800", "a\ud800b", "../x", "/etc/passwd", "x" * 70, "\u202e", "\n"),
        *("[" * 3000, "NaN", "null", "1e999", "0x10", "{{ x }}", "<|im_end|>", "𝒶nn", "global"),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308, -0.0]),
    st.text(max_size=10),
    NASTY_TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def paths_in(value, prefix=()):
    """Return the path of every part of nested lists and dictionaries."""
    found = [prefix] if prefix else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += paths_in(inner, (*prefix, key))
    return found


@st.composite
def broken(draw, whole, values=VALUES):
    """Draw a copy of ``whole`` with one to four parts removed, replaced, added or doubled."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 4))):
        paths = paths_in(whole)
        if not paths:
            return draw(values)
        *parents, key = draw(st.sampled_from(paths))
        node = whole
        for parent in parents:
            node = node[parent]
        action = draw(st.sampled_from(["remove", "replace", "add", "double", "swap"]))
        if action == "remove":
            del node[key]
        elif action == "double" and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif action == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=8) | NASTY_TEXT)] = draw(values)
        elif action == "swap":
            other = draw(st.sampled_from(paths))
            value = whole
            for part in other:
                value = value[part] if _has(value, part) else None
            node[key] = copy.deepcopy(value)
        else:
            node[key] = draw(values)
    return whole


def _has(value, part):
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


@st.composite
def damaged(draw, content: bytes):
    """Draw bytes near ``content``: cut, extended, flipped, doubled or in part replaced."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        action = draw(st.sampled_from(["cut", "extend", "flip", "insert", "drop", "double"]))
        if action == "cut":
            content = content[:at]
        elif action == "extend":
            content += draw(st.binary(max_size=40))
        elif action == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "insert":
            pieces = [
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"\0",
                b"[" * 3000,
                b"\xed\xa0\x80",
                b"\n",
                b'"',
            ]
            content[at:at] = draw(st.binary(max_size=8) | st.sampled_from(pieces))
        elif action == "drop":
            del content[at : at + draw(st.integers(1, 30))]
        elif action == "double":
            content += content[at : at + 200]
    return bytes(content)


# Configurations.

RAW_CONFIG = {
    "experiment": {"name": "tiny", "seed": 7, "track": []},
    "model": {"name": "model", "revision": None, "trust_remote_code": False},
    "adapters": {"global": {"rank": 4}, "local": {"alpha": 4.0, "target_modules": ["q_proj"]}},
    "training": {"learning_rate": 0.01, "batch_size": 2, "local_kl_weight": 0.0, "replay": 1.0},
    "federated": {
        "num_rounds": 2,
        "min_clients": 2,
        "clients": [
            {"id": client, "system_prompt": "", "local_train": "a.json", "universal_train": None}
            for client in ("ann", "bob")
        ],
    },
    "data": {"universal_train": "u.json", "conflict_test": None},
    "evaluation": {"local_scales": [0.5, 1.0]},
}
YAML_PIECES = [
    *("!!int ''", "!!int _", "!!float ''", "!!bool x", "!!timestamp x", "!!binary '*'", "!!set 3"),
    *("&a [*a]", "&a {b: *a}", "*nowhere", "!!python/object/apply:os.system [exit]", "2026-13-45"),
    *(
        "0x" + "f" * 5000,
        "9" * 5000,
        "1:1:1:1",
        ".inf",
        ".nan",
        "? [a]\n: b",
        "<<: [1]",
        "!!omap 3",
    ),
    *(
        "[" * 600,
        "{" * 600,
        "- " * 500,
        "a: b: c",
        "---\nx",
        "%YAML 9.9\n---\n",
        "\t",
        "'",
        '"\\ud800"',
    ),
    *("federated:\n  clients: []", "federated: {clients: [], clients: []}", "null", "- 1", "~: 1"),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "federated: {clients: [{id: *i, system_prompt: *i, local_train: *i}]}\n",
    "x: &x {k: 1}\n"
    + "".join(f"x{n}: &x{n} {{<<: [*x{n - 1 or ''}, *x{n - 1 or ''}]}}\n" for n in range(1, 40)),
]


def require_valid_config(config: Config) -> None:
    """Check by other means than the model's own what an accepted configuration promises."""
    assert parse_config(config.dump()) == config
    plain = json.loads(json.dumps(config.dump(), allow_nan=False))
    assert parse_config(plain) == config
    ids = [client["id"] for client in plain["federated"]["clients"]]
    assert ids and len({name.lower() for name in ids}) == len(ids)
    for name in [*ids, plain["experiment"]["name"]]:
        assert re.fullmatch("[A-Za-z0-9._-]{1,64}", name) and name[0] not in "._-"
    for path in paths_in(plain):
        value = plain
        for part in path:
            value = value[part]
        if type(value) is int:
            assert 0 <= value < 2**31
    assert plain["training"]["learning_rate"] > 0 and plain["adapters"]["local"]["rank"] > 0
    assert (plain["federated"]["min_clients"] or 1) <= len(ids)


@for_all(700, raw=broken(RAW_CONFIG), as_file=st.booleans())
def test_broken_configs(raw, as_file):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(_dump_json(raw), encoding="utf-8")
        before = path.read_bytes()
        if as_file:
            config = attempt(lambda: load_config(path), str(path))
        else:
            config = attempt(lambda: parse_config(raw), "the configuration")
        assert path.read_bytes() == before
    if config is not None:
        require_valid_config(config)


def _dump_json(raw) -> str:
    """Return JSON also for integers that Python does not write in decimal."""
    try:
        return json.dumps(raw)
    except ValueError:
        return repr(raw)


@for_all(
    500,
    content=damaged(yaml.safe_dump(RAW_CONFIG).encode())
    | st.sampled_from(YAML_PIECES).map(str.encode)
    | st.lists(st.sampled_from(YAML_PIECES), min_size=2, max_size=4).map(
        lambda p: "\n".join(p).encode()
    )
    | st.tuples(
        st.sampled_from(["model", "training", "federated", "x"]), st.sampled_from(YAML_PIECES)
    ).map(lambda p: f"{p[0]}: {p[1]}".encode())
    | st.binary(max_size=100),
)
def test_damaged_yaml(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(content)
        config = attempt(lambda: load_config(path), str(path))
        assert path.read_bytes() == content
    if config is not None:
        require_valid_config(config)


KEYS = [".".join(map(str, path)) for path in paths_in(RAW_CONFIG)]


@for_all(
    300,
    words=st.lists(
        st.tuples(
            st.sampled_from(
                [*KEYS, "federated.clients.²", f"federated.clients.{'9' * 5000}", "a..b"]
            )
            | st.text(max_size=8),
            st.sampled_from(["=", "==", "", " "]),
            st.sampled_from([piece[:200] for piece in YAML_PIECES]) | st.text(max_size=8),
        ).map("".join),
        max_size=3,
    ),
)
def test_broken_overrides(words):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(json.dumps(RAW_CONFIG))
        config = attempt(lambda: load_config(path, overrides=" ".join(words)), str(path))
    if config is not None:
        require_valid_config(config)


def test_faults_without_number_end_soon():
    raw = RAW_CONFIG | {f"key{i}": i for i in range(20_000)} | {"x" * 10**6: 1}
    started = time.monotonic()
    with pytest.raises(ConfigError, match="(?s)20001 faults.*and 19951 more") as caught:
        parse_config(raw)
    assert time.monotonic() - started < SLOWEST_SECONDS
    assert len(str(caught.value)) < LONGEST_MESSAGE


def test_a_config_that_is_no_file_or_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_text("#" * (2 << 20))
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "big", "loop", "", "a\0b", "x" * 300):
        assert attempt(lambda: load_config(tmp_path / name), str(tmp_path)) is None  # noqa: B023


# Names that become folders.

BAD_NAMES = [
    *("..", ".", "../x", "a/b", "/a", "a/", "a\\b", "C:x", ".a", "-a", "_a", "", " ", "a b", "a\0"),
    *(
        "a\n",
        "\na",
        "x" * 65,
        "x" * 10_000,
        "аnn",
        "ann\u200b",
        "a\u2215b",
        "a\uff0fb",
        "\u2024\u2024",
    ),
    *("ａnn", "é", "a\ud800", "~", "a*", "a:b", "%2e%2e", "a;b", "$HOME", "`a`", "a\tb", "a\u0338"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_are_no_folder_names(name):
    for section, key in (("experiment", "name"), ("federated", "id")):
        raw = copy.deepcopy(RAW_CONFIG)
        (raw[section] if key == "name" else raw[section]["clients"][0])[key] = name
        expected = "experiment.name" if key == "name" else "federated.clients.0.id"
        assert attempt(lambda: parse_config(raw), expected) is None  # noqa: B023
    assert attempt(lambda: check_run_name(name), "run-name") is None


@for_all(300, name=st.text(max_size=70) | st.text("abAB01._-/\\", max_size=6))
def test_a_name_that_is_taken_is_one_folder(name):
    accepted = attempt(lambda: check_run_name(name), "run-name")
    raw = copy.deepcopy(RAW_CONFIG)
    raw["federated"]["clients"][0]["id"] = name
    config = attempt(lambda: parse_config(raw), "federated.clients")
    for taken in (accepted, config and config.federated.clients[0].id):
        if taken is not None:
            assert taken == name == unicodedata.normalize("NFKC", name) and name.isascii()
            assert Path("runs", name).resolve().parent == Path("runs").resolve()


# Records.

RECORD = {
    "instruction": "How long is it?",
    "input": "",
    "output": "Six months.",
    "fact": "probation",
    "distractors": ["Three.", "Nine."],
    "evaluation_guide": {"ann_keywords": ["six"]},
}
CONFLICT = {
    "instruction": "How long?",
    "answers": {"ann": "Six.", "bob": "Nine."},
    "evaluation_guide": {"ann_keywords": ["six", "可以"]},
    "distractors": ["Two."],
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-7"]
LOADERS = {
    "training": (RECORD, load_records),
    "conflict": (CONFLICT, lambda path, **kw: load_conflicts(path, ["ann", "bob"], **kw)),
}


@st.composite
def record_files(draw, record):
    """Draw the bytes of a file of broken records."""
    records = [
        draw(broken(record) | st.just(record) | VALUES) for _ in range(draw(st.integers(0, 4)))
    ]
    form = draw(st.sampled_from(["list", "lines", "repeated", "deep", "number", "raw"]))
    texts = [_dump_json(record) for record in records]
    if form == "lines":
        text = draw(st.sampled_from(["\n", "\r\n", "\n\n", " ", ",", "\u2028"])).join(texts)
    elif form == "repeated":
        pair = draw(st.sampled_from(['"output": "x"', '"answers": {"ann": "x", "ann": "y"}']))
        text = json.dumps(record)[:-1] + f", {pair}, {pair}}}"
    elif form == "deep":
        text = f'[{{"instruction": {"[" * 5000}{"]" * draw(st.integers(0, 5000))}}}]'
    elif form == "number":
        number = draw(st.sampled_from(["9" * 5000, "1e999", "-0", "NaN", "-Infinity", "0x1", "01"]))
        text = json.dumps(record)[:-1] + f', "other": {number}}}'
    elif form == "raw":
        text = draw(st.text(max_size=40))
    else:
        text = f"[{', '.join(texts)}]"
    content = text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    return draw(damaged(content)) if draw(st.booleans()) else content


def require_valid_records(file, is_conflict: bool) -> None:
    assert file.records and file.num_skipped >= 0
    for record in file.records:
        assert isinstance(record.instruction, str) and record.instruction.strip()
        texts = [record.instruction, record.input, record.output, record.fact or ""]
        texts += [
            *record.distractors,
            *(word for words in record.keywords.values() for word in words),
        ]
        if is_conflict:
            assert record.answers or record.keywords
            assert {*record.answers, *record.keywords} <= {"ann", "bob"}
            assert all(answer.strip() for answer in record.answers.values())
            texts += record.answers.values()
        else:
            assert record.output.strip()
        for text in texts:
            assert isinstance(text, str)
            text.encode()


@for_all(500, data=st.data())
@pytest.mark.parametrize("kind", LOADERS)
def test_broken_records(kind, data):
    record, load_file = LOADERS[kind]
    content = data.draw(record_files(record))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        path.write_bytes(content)
        strict = attempt(lambda: load_file(path), str(path))
        lenient = attempt(lambda: load_file(path, skip_invalid=True), str(path))
        assert path.read_bytes() == content
    if strict is not None:
        assert strict.num_skipped == 0 and lenient.records == strict.records
    for file in (strict, lenient):
        if file is not None:
            require_valid_records(file, kind == "conflict")


@for_all(300, data=st.data())
def test_the_fault_of_one_record_names_its_number(data):
    bad = data.draw(broken(RECORD))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text(f"{json.dumps(RECORD)}\n{_dump_json(bad)}\n{json.dumps(RECORD)}\n")
        attempt(
            lambda: load_records(path), "1 of 3 records are invalid:\n  record 2:", "line 2 is not"
        )


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"instruction": "a", "output": "b", "output": "c"}]')
    with pytest.raises(DataError, match="record 1: the key 'output' is there more than once"):
        load_records(path)


def test_data_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "", "loop", "a\0b", "x" * 300):
        shown = ascii(str(tmp_path / name))[1:-1]
        assert attempt(lambda: load_records(tmp_path / name), shown, str(tmp_path)) is None  # noqa: B023
    for device in (Path("/dev/zero"), Path("/dev/stdin")):
        assert attempt(lambda: load_records(device), str(device)) is None  # noqa: B023


def test_data_may_lie_anywhere_and_nothing_is_written_there(tiny_project, tokenizer, tmp_path):
    """A client's own paths may leave the project; only the project's own folder is written to."""
    project, outside = tmp_path / "project", tmp_path / "outside"
    shutil.copytree(tiny_project, project, ignore=shutil.ignore_patterns("model", ".cache"))
    outside.mkdir()
    for name in ("ann_local.json", "ann_universal.json"):
        (project / name).rename(outside / name)
    config = build_tiny_config()
    raw = config.dump()
    raw["federated"]["clients"][0] |= {
        "local_train": "../outside/ann_local.json",
        "local_test": str(outside / "ann_local.json"),
        "universal_train": "../outside/ann_universal.json",
    }
    config = parse_config(raw)
    before = snapshot(outside)
    client = config.client("ann")
    files = load_client_files(config, client, project)
    tokenize_client_files(config, client, files, tokenizer, project)
    assert snapshot(outside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "project"]
    assert (project / ".cache" / "tokens").is_dir()


# Adapter folders.


class _Bomb:
    """A pickle of it leaves a file behind when somebody opens it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def adapter(tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A real local adapter: its model, shapes and the bytes of its two files."""
    config = {"global": {"rank": 2}, "local": {"rank": 2, "alpha": 4}}
    config = AdaptersConfig.model_validate(config)
    model = attach_adapters(build_tiny_model(len(tokenizer), num_hidden_layers=1), config)
    folder = tmp_path_factory.mktemp("adapter") / "a"
    sha256 = save_adapter(folder, model, LOCAL, build_initial_state(model, LOCAL, 1), "tiny")
    return SimpleNamespace(
        model=model,
        shapes=state_shapes(model, LOCAL),
        sha256=sha256,
        weights=(folder / WEIGHTS).read_bytes(),
        config=(folder / ADAPTER_CONFIG).read_bytes(),
    )


def with_header(content: bytes, change) -> bytes:
    """Return a safetensors file with another table of contents before the same values."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(change(header)).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@st.composite
def weight_files(draw, content: bytes):
    """Draw the bytes of a weight file that is damaged or another's."""
    state = load(content)
    key = draw(st.sampled_from(sorted(state)))
    metadata = {"fedlora_role": LOCAL}
    kind = draw(
        st.sampled_from(
            ("bytes", "length", "header", "dtype", "shape", "names", "values", "role", "pickle", "")
        )
    )
    if kind == "bytes":
        return draw(damaged(content))
    if kind == "length":
        size = draw(st.sampled_from([0, 1, 2**63, 2**64 - 1, len(content), 100_000_001, 2**32]))
        return size.to_bytes(8, "little") + content[8:]
    if kind == "header":
        size = int.from_bytes(content[:8], "little")
        header = draw(broken(json.loads(content[8 : 8 + size])))
        if draw(st.booleans()):
            return with_header(content, lambda _: header)
        huge = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
        return with_header(content, lambda old: old | {key: huge})
    if kind == "dtype":
        dtypes = [
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int32,
            torch.uint8,
            torch.bool,
        ]
        dtypes += [torch.float8_e4m3fn, torch.complex64]
        dtype = draw(st.sampled_from(dtypes))
        chosen = sorted(state) if draw(st.booleans()) else [key]
        return save(state | {name: state[name].to(dtype) for name in chosen}, metadata)
    if kind == "shape":
        shapes = [tuple(state[key].T.shape), (), (0,), (1, 1), (*state[key].shape, 1), (3000, 300)]
        return save(state | {key: torch.zeros(draw(st.sampled_from(shapes)))}, metadata)
    if kind == "names":
        other = {name: tensor for name, tensor in state.items() if name != key}
        name = draw(st.sampled_from(["x", "", f"{key}.x", "../x", key.replace("lora_A", "lora_B")]))
        return save(other if draw(st.booleans()) else other | {name: state[key].clone()}, metadata)
    if kind == "values":
        tensor = state[key].clone()
        tensor.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38, 0.0]))
        return save(state | {key: tensor}, metadata)
    if kind == "role":
        roles = st.none() | st.dictionaries(
            st.just("fedlora_role") | st.text(), st.text(max_size=9)
        )
        return save(state, draw(roles | st.just({"fedlora_role": "global"})))
    if kind == "pickle":
        return pickle.dumps({name: tensor.tolist() for name, tensor in state.items()})
    return content


@st.composite
def adapter_configs(draw, content: bytes):
    """Draw the bytes of an adapter's JSON that is damaged, another's or still good."""
    kind = draw(st.sampled_from(["bytes", "parts", "other", "same", "same"]))
    if kind == "bytes":
        return draw(damaged(content))
    if kind == "parts":
        return _dump_json(draw(broken(json.loads(content)))).encode()
    if kind == "other":
        others = [b"", b"[1]", b"null", b"3", b"[" * 100_000, b'"\\ud800"', b"{" * 5, b"NaN"]
        others += [b'{"base_model_name_or_path": "\\ud800"}', b'{"base_model_name_or_path": [1]}']
        return draw(st.sampled_from([*others, b" " * (2 << 20)]))
    return content


@st.composite
def placements(draw):
    """Draw what stands where a file should: the file, or something else."""
    kinds = ["file"] * 6 + ["absent", "folder", "pipe", "link out", "link in", "dangling", "loop"]
    return draw(st.sampled_from([*kinds, "sparse"]))


def place(path: Path, content: bytes, how: str, outside: Path) -> None:
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link out":
        (outside / path.name).write_bytes(content)
        path.symlink_to(outside / path.name)
    elif how == "link in":
        (path.parent / "real").mkdir(exist_ok=True)
        (path.parent / "real" / path.name).write_bytes(content)
        path.symlink_to(Path("real", path.name))
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how in ("file", "sparse"):
        path.write_bytes(content)
        if how == "sparse":
            os.truncate(path, 1 << 36)


@for_all(1000, data=st.data())
def test_broken_adapter_folders(adapter, data):
    weights, config = (
        data.draw(weight_files(adapter.weights)),
        data.draw(adapter_configs(adapter.config)),
    )
    how = [data.draw(placements()), data.draw(placements())]
    if data.draw(st.booleans()):
        how[data.draw(st.integers(0, 1))] = "file"
    with tempfile.TemporaryDirectory() as scratch:
        outside, folder = Path(scratch, "outside"), Path(scratch, "run", "a")
        outside.mkdir()
        folder.mkdir(parents=True)
        place(folder / WEIGHTS, weights, how[0], outside)
        place(folder / ADAPTER_CONFIG, config, how[1], outside)
        mark = Path(scratch, "opened")
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
        before = snapshot(Path(scratch))
        state = attempt(lambda: load_adapter(folder, adapter.model, LOCAL, "tiny"), str(folder))
        checked = None
        if state is not None:
            checked = attempt(
                lambda: load_adapter(folder, adapter.model, LOCAL, "tiny", sha256=adapter.sha256),
                f"{folder / WEIGHTS} is not the file",
            )
        assert snapshot(Path(scratch)) == before and not mark.exists()
    if state is not None:
        assert set(how) <= {"file", "link in"}
        assert {name: tensor.shape for name, tensor in state.items()} == adapter.shapes
        for tensor in state.values():
            assert tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all())
        assert json.loads(config)["base_model_name_or_path"] == "tiny"
    assert (checked is not None) == (state is not None and weights == adapter.weights)


class TestAdapterRefusals:
    @pytest.fixture
    def folder(self, adapter, tmp_path) -> Path:
        folder = tmp_path / "run" / "clients" / "ann" / "round_001"
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(adapter.weights)
        (folder / ADAPTER_CONFIG).write_bytes(adapter.config)
        return folder

    def test_another_hash(self, adapter, folder):
        load_adapter(folder, adapter.model, LOCAL, "tiny", sha256=adapter.sha256)
        expected = rf"{WEIGHTS} is not the file.*begins with {adapter.sha256[:12]}, expected abab"
        with pytest.raises(AdapterError, match=expected):
            load_adapter(folder, adapter.model, LOCAL, "tiny", sha256="ab" * 32)

    def test_a_folder_that_is_a_link_out_of_the_run(self, adapter, folder, tmp_path):
        run = tmp_path / "run"
        moved = folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(moved)
        with pytest.raises(AdapterError, match="round_001.*is a link that leads out of .*run"):
            load_adapter(folder, adapter.model, LOCAL, "tiny", within=run)
        folder.unlink()
        moved.rename(run / "kept")
        folder.symlink_to(run / "kept")
        load_adapter(folder, adapter.model, LOCAL, "tiny", within=run)

    def test_a_run_reached_through_a_link_is_no_link_out_of_it(self, adapter, folder, tmp_path):
        (tmp_path / "latest").symlink_to("run")
        run = tmp_path / "latest"
        load_adapter(
            run / folder.relative_to(tmp_path / "run"), adapter.model, LOCAL, "tiny", within=run
        )

    def test_a_pickle_in_place_of_the_weights(self, adapter, folder, tmp_path):
        (folder / WEIGHTS).unlink()
        mark = tmp_path / "opened"
        for name in ("adapter_model.bin", WEIGHTS):
            (folder / name).write_bytes(pickle.dumps(_Bomb(mark)))
            with pytest.raises(AdapterError, match=WEIGHTS):
                load_adapter(folder, adapter.model, LOCAL, "tiny")
        assert not mark.exists()


# Run directories.


def build_run(folder: Path, adapter) -> dict:
    """Write a run directory of one round and return its manifest."""
    hashes = {}
    for name, place_ in (
        ("global", "server"),
        ("local:ann", "clients/ann"),
        ("local:bob", "clients/bob"),
    ):
        path = folder / place_ / "round_001"
        path.mkdir(parents=True)
        (path / WEIGHTS).write_bytes(adapter.weights)
        hashes[name] = hash_file(path / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(build_tiny_config().dump()))
    (folder / "history.json").write_text(
        json.dumps(
            [{"round": 1, "client": "ann", "phase": "x", "metrics": {"train_local/num_steps": 2}}]
        )
    )
    manifest = {
        "format": 1,
        "finished": None,
        "mode": "dual",
        "base_model": {"name": "model", "revision": None, "commit": None},
        "versions": {"torch": "2"},
        "clients": {"ann": {"device": "CPU"}, "bob": {"device": "CPU"}},
        "rounds": [{"round": 1, "completed": "now", "adapters": hashes}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def read_everything(path: Path) -> None:
    run = load_run(path)
    last = run.last_round
    run.find_evaluation(last)
    run.count_steps(last)
    run.count_parameters(last, run.plan(last).evaluated)
    for client in (None, *run.config.client_ids):
        run.adapter_sha256(last, client)
    assert all(isinstance(entry["round"], int) for entry in run.manifest["rounds"])
    assert isinstance(run.manifest["base_model"]["name"], str)


@for_all(300, data=st.data())
def test_broken_run_directories(adapter, data):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch).resolve() / "run"
        build_run(path, adapter)
        name = data.draw(st.sampled_from(["manifest.json"] * 4 + ["config.json", "history.json"]))
        content = (path / name).read_bytes()
        evaluation = data.draw(st.none() | VALUES.map(_dump_json))
        if evaluation is not None:
            (path / "evaluation.json").write_text(evaluation)
        if data.draw(st.booleans()):
            content = data.draw(damaged(content))
        else:
            content = _dump_json(data.draw(broken(json.loads(content)))).encode()
        (path / name).write_bytes(content)
        before = snapshot(path)
        attempt(lambda: read_everything(path), str(path))
        assert snapshot(path) == before


@pytest.mark.parametrize("link", ["server", "server/round_001", f"server/round_001/{WEIGHTS}"])
def test_adapters_that_are_links_out_of_their_run_are_refused(adapter, tmp_path, link):
    path = tmp_path / "run"
    build_run(path, adapter)
    read_everything(path)
    (path / link).rename(tmp_path / "elsewhere")
    (path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError, match="is a link that leads out of the run directory"):
        load_run(path).adapter_sha256(1)
    with pytest.raises(RunDirectoryError, match="is a link that leads out of the run directory"):
        load_run(path).count_parameters(1, ["global"])


def test_what_is_no_run_directory_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "nowhere", "", "a\0b", "x" * 300):
        named = ascii(str(tmp_path / name))[1:-1]
        assert attempt(lambda: load_run(tmp_path / name), named, str(tmp_path)) is None  # noqa: B023


# Messages. What arrives is what protobuf can carry: no lone surrogates in texts, 64-bit integers.

STATE = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)}
SHAPES = {key: tensor.shape for key, tensor in STATE.items()}
CONFIG_VALUES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["../x", "ann", "bob", "[" * 100_000, "{}", "[]", "null", "NaN", "x" * 9999]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.binary(max_size=8),
    st.lists(st.integers(-5, 5), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
)
METRIC_NAMES = [
    "num-examples",
    "update_norm",
    "global/conflict/exact_match",
    "train_global/num_steps",
]
METRIC_NAMES += ["global/conflict/exact_match_each", "secret", "peak_memory_bytes", ""]


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def npy(array: np.ndarray, **header) -> bytes:
    """Return an array in numpy's format, under another header where one is given."""
    text = str({"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header)
    body = text.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + array.tobytes()


@st.composite
def arrays(draw, good: Array):
    """Draw a Flower array: good, or wrong in what it says of itself or in what it holds."""
    array = good.numpy()
    kind = draw(
        st.sampled_from(["good", "dtype", "claim", "shape", "header", "bytes", "values", "zip"])
    )
    if kind == "dtype":
        dtypes = ["f8", "f2", "i4", "u2", "u1", "?", "c8", "U3", "S2", ">f4", "M8[s]"]
        array = np.ones(array.shape, dtype=draw(st.sampled_from(dtypes)))
    if kind == "shape":
        shapes = [(), (0,), (1,), (3,), (len(array) // 2, 2), (*array.shape, 1), (1000, 1000)]
        array = np.ones(draw(st.sampled_from(shapes)), dtype="f4")
    if kind == "values":
        array = array.copy()
        array.flat[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
    data = npy(array)
    if kind == "header":
        headers = [{"shape": (2**40,)}, {"shape": (2**62, 2**62)}, {"shape": (-1, 3)}, {"shape": 3}]
        headers += [{"descr": "|O"}, {"descr": "f4,i8"}, {"descr": [("a", "f4")]}, {"descr": 3}]
        headers += [{"fortran_order": True}, {"x": 1}, {"shape": ("a",)}, {"shape": (2.0, 3)}]
        data = npy(array, **draw(st.sampled_from(headers)))
    if kind == "bytes":
        data = draw(damaged(data) | st.just(pickle.dumps([1])) | st.just(b""))
    if kind == "zip":
        with tempfile.SpooledTemporaryFile() as file:
            np.savez(file, a=array)
            file.seek(0)
            data = file.read()
    dtype, shape, stype = str(array.dtype), tuple(array.shape), "numpy.ndarray"
    if kind == "claim" or draw(st.integers(0, 4)) == 0:
        dtype = draw(st.sampled_from([dtype, "float32", "uint16", "float64", "", "object"]))
        shape = draw(st.sampled_from([shape, (2**62,), (-1,), ()]))
        stype = draw(st.sampled_from([stype, "", "pickle"]))
    return Array(dtype, shape, stype, data)


@st.composite
def states(draw):
    """Draw the arrays of a message."""
    ((key, good),) = pack_state(STATE).items()
    array = draw(arrays(good))
    record = {key: array}
    action = draw(st.sampled_from(["keep", "keep", "remove", "add", "rename"]))
    if action != "keep":
        if action != "add":
            del record[key]
        if action != "remove":
            record[draw(st.text(max_size=5) | st.just("\ud800"))] = array
    return ArrayRecord(record)


def require_valid_state(state) -> None:
    if state is not None:
        assert {key: tensor.shape for key, tensor in state.items()} == SHAPES
        for tensor in state.values():
            assert tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all())


@for_all(1000, record=states(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_broken_states_in_messages(record, dtype):
    require_valid_state(attempt(lambda: unpack_state(record, SHAPES, "ann", dtype), "ann"))


def good_task() -> dict:
    """Return a task as it travels."""
    given_ = {
        "client_id": "ann",
        "server_round": 1,
        "kept": json.dumps({"local": [0, "", 0]}),
        "run_name": "run",
        "experiment": json.dumps(RAW_CONFIG),
    }
    other = {"int": 0, "bool": False, "str": ""}
    return {field.name: given_.get(field.name, other[field.type]) for field in fields(Task)}


@st.composite
def broken_record(draw, good, values, names=()):
    """Draw a record with some values replaced, left out or added."""
    record = dict(good)
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([*good, *names]) if good or names else st.just("x"))
        if draw(st.booleans()):
            record[key] = draw(values)
        else:
            record.pop(key, None)
    return record


@for_all(500, data=st.data())
def test_broken_messages_from_the_server(data):
    task = data.draw(broken_record(good_task(), CONFIG_VALUES, ["x", "client-id"]))
    if isinstance(task.get("experiment"), str) and data.draw(st.booleans()):
        task["experiment"] = _dump_json(data.draw(broken(RAW_CONFIG)))
    kind = data.draw(st.sampled_from([ConfigRecord] * 6 + [MetricRecord, None]))
    content = RecordDict({ADAPTER_RECORD: data.draw(states())})
    if kind is ConfigRecord:
        content[TASK_RECORD] = ConfigRecord(task)
    elif kind is MetricRecord:
        content[TASK_RECORD] = MetricRecord({"x": 1})
    message = Message(content, dst_node_id=1, message_type="train")
    if data.draw(st.integers(0, 9)) == 0:
        message = Message(Error(code=0, reason="x"), reply_to=message)

    def read() -> Task:
        found = read_task(message)
        assert isinstance(found.config, Config)
        assert all(kept.is_possible for kept in found.from_kept.values())
        check_run_name(found.run_name)
        return found

    found = attempt(read, "server", "experiment that was sent", "run-name")
    if found is not None:
        require_valid_config(found.config)
        for field in fields(Task):
            assert type(getattr(found, field.name)).__name__ == field.type
        assert found.server_round >= 0


def reply_to_nobody(content) -> Message:
    request = Message(RecordDict(), dst_node_id=5, message_type="train")
    return Message(content, reply_to=request)


@for_all(1000, data=st.data())
def test_broken_replies_from_clients(data):
    facts = json.dumps({"device": "CPU", "base_model": "a" * 64, "findings": "[]"})
    about = {"client-id": "ann", "server-round": 3, "dtype": "float32", "facts": facts}
    about = data.draw(broken_record(about, CONFIG_VALUES, ["error", "x"]))
    if "facts" in about and data.draw(st.booleans()):
        about["facts"] = _dump_json(data.draw(broken(json.loads(facts)) | VALUES))
    numbers = (
        st.integers(-(2**63), 2**64 - 1) | st.floats() | st.lists(st.integers(-5, 5), max_size=3)
    )
    numbers |= st.lists(st.floats(), max_size=3)
    metrics = data.draw(broken_record({"num-examples": 3}, numbers, METRIC_NAMES))
    records = {
        ABOUT_RECORD: ConfigRecord(about),
        METRIC_RECORD: MetricRecord(metrics),
        UPDATE_RECORD: data.draw(st.just(pack_state(STATE)) | states()),
    }
    for name in data.draw(st.lists(st.sampled_from(list(records)), max_size=2)):
        records[name] = data.draw(st.sampled_from([ConfigRecord(), MetricRecord(), ArrayRecord()]))
    if data.draw(st.integers(0, 9)) == 0:
        message = reply_to_nobody(Error(code=0, reason=data.draw(st.none() | st.text(max_size=9))))
    else:
        message = reply_to_nobody(RecordDict(records))
    known = data.draw(st.sampled_from(["ann", None]))
    names = ["ann"] if known else ["ann", "bob", "node 5", str(about.get("client-id"))]
    reply = attempt(lambda: read_reply(message, known, 3), *names)
    if reply is None:
        return
    assert reply.client_id == about["client-id"] and about["server-round"] == 3
    assert "error" not in about
    for name, value in reply.metrics.items():
        values = value if name.endswith("_each") else [value]
        assert isinstance(value, list) == name.endswith("_each")
        assert all(math.isfinite(number) for number in values)
        assert isinstance(value, list | float) or value >= 0
    assert isinstance(reply.facts, dict)
    for name, fact in reply.facts.items():
        assert isinstance(fact, str)
        f"{name}{fact}".encode()
    if reply.arrays is not None:
        arrays_ = reply.arrays
        require_valid_state(attempt(lambda: unpack_state(arrays_, SHAPES, "ann"), "ann"))


def test_a_failing_client_cannot_speak_for_another():
    about = ConfigRecord({"client-id": "bob", "error": "out of paper"})
    with pytest.raises(MessageError, match="^ann: out of paper"):
        read_reply(reply_to_nobody(RecordDict({ABOUT_RECORD: about})), "ann", 1)
