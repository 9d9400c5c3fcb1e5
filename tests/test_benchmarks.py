"""Every benchmark in its smallest form: that it runs, and that its figures add up."""

from __future__ import annotations

import importlib
import os
import re
import sys

import pytest
from conftest import ROOT

from fedlora_app.foundation.errors import UserError

sys.path.insert(0, str(ROOT))  # the benchmarks lie beside the package and are not installed

pytestmark = pytest.mark.minutes
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    """Server and clients, a process each, would otherwise wait for each other's threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def bench(name: str):
    """Return a module of the benchmarks, of which other tests need none."""
    return importlib.import_module(f"benchmarks.{name}")


def require_table(benchmark, figures) -> None:
    assert re.search(r"^\|---", benchmark.describe(figures), re.MULTILINE)


def test_turns_alternate_and_neighbours_are_compared():
    turns = bench("turns")
    order: list[str] = []
    seconds = iter([9.0, 9.0, 2.0, 1.0, 8.0, 2.0, 9.0, 3.0])

    def work(name: str):
        def run() -> float:
            order.append(name)
            return next(seconds)

        return run

    taken = turns.take_turns({"a": work("a"), "b": work("b")}, 3)
    assert order == ["a", "b"] * 4
    assert taken == {"a": [2.0, 8.0, 9.0], "b": [1.0, 2.0, 3.0]}
    expected = {"value": 3.0, "low": 2.0, "high": 4.0, "n": 3}
    assert turns.compute_ratio(taken["a"], taken["b"]) == expected


def test_all_runs_every_benchmark_but_long_ones_and_those_of_given_runs():
    main = bench("__main__")
    commands = {
        command.name or command.callback.__name__ for command in main.app.registered_commands
    }
    assert commands == {*main.OF_ALL, "all", "long", "survival", "privacy"}


def test_one_load_per_client_process_and_none_in_the_server():
    loads = bench("loads")
    figures = loads.measure(num_rounds=2, num_clients=3)
    assert figures["loads_per_client_process"] == [1] and figures["is_the_only_client_process"]
    assert figures["loads_in_server"] == 0
    require_table(loads, figures)


def test_poison_moves_the_mean_and_is_refused_by_the_bounds():
    poison = bench("poison")
    figures = poison.measure(num_rounds=2, max_steps=2, poisons=(poison.HONEST, "100 times"))
    found = {(row["poison"], row["defence"]): row for row in figures["rows"]}
    assert found[poison.HONEST, "fedavg"]["distance"] == 0
    assert not any(row["refused"] for row in figures["rows"] if row["poison"] == poison.HONEST)
    assert found["100 times", "fedavg"]["distance"] > 10
    assert found["100 times", "median"]["distance"] < 1
    assert found["100 times", "max_norm_ratio: 3"]["refused"] == 1  # from the second round on
    assert found["100 times", "and max_update_norm"]["refused"] == 2
    require_table(poison, figures)


def test_overhead():
    overhead = bench("overhead")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    figures = overhead.measure(0.1, num_rounds=2, num_turns=1, copies=2, rank=2, **sizes)
    assert 0 < figures["overhead_share"]["value"] < 1
    assert figures["rounds"][0]["phase_seconds"] > 0
    require_table(overhead, figures)


def test_step():
    step = bench("step")
    figures = step.measure(1, num_examples=2, length=24, rank=2, num_steps=1, **TINY)
    assert set(figures["ratio_to_trainer"]) == set(step.WAYS)
    assert figures["loss_difference"] < 1e-3
    require_table(step, figures)


def test_packing():
    padding = bench("padding")
    figures = padding.measure(1, num_examples=4, batch_size=2, limit=192, rank=2, **TINY)
    shares = figures["padding_share"]
    assert shares[padding.PACKED] == 0 < shares[padding.LONGEST] < shares[padding.LIMIT]
    require_table(padding, figures)


def test_loss():
    loss_memory = bench("loss_memory")
    figures = loss_memory.measure(positions=512, hidden_size=32, vocabulary=5000)
    assert all(row["share_of_full"] < 0.5 for row in figures["rows"])
    require_table(loss_memory, figures)


def test_bytes():
    traffic = bench("traffic")
    figures = traffic.measure(1, rank=16, large_rank=1, hidden_size=64, intermediate_size=64)
    counted = figures["rows"][0]
    assert counted["array_records"] == ["global-adapter", "global-update"]
    assert all(row["local_adapter_bytes"] == 0 and row["ratio"] > 1 for row in figures["rows"])
    require_table(traffic, figures)


def test_evaluation():
    evaluation = bench("evaluation")
    figures = evaluation.measure(1, num_questions=4, num_steps=1)
    assert figures["generated_differently"] == 0 and figures["largest_difference_nats"] < 1e-3
    require_table(evaluation, figures)


def test_leaving():
    leaving = bench("leaving")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    figures = leaving.measure(1, num_prompts=6, max_new_tokens=16, **sizes)
    assert set(figures["answered_differently"].values()) == {0}
    assert figures["mean_length"] < figures["longest"] <= 16
    require_table(leaving, figures)


def test_layers():
    layers = bench("layers")
    sizes = TINY | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    figures = layers.measure(num_turns=1, num_passes=2, num_examples=4, first_layers=(2,), **sizes)
    ratios = figures["to_all_layers"]
    assert ratios[layers.ALL]["value"] == 1 and len(ratios) == 6
    require_table(layers, figures)


def test_gate():
    gate = bench("gate")
    figures = gate.measure("data/demo/base_model", 1, ROOT)
    rows = {(row["setting"], row["way"]): row for row in figures["rows"]}
    # This base model tells questions apart no better; a gate that compares facts stays closed then.
    apart, entangled = rows["kinds apart", "gate"], rows["other topics", "gate"]
    assert apart["by_fact"] and apart["local"] > 0.75
    assert max(apart[kind] for kind in ("seen", "unknown", "far")) < 0.05
    kinds = rows["other topics", "kinds only"]
    assert not kinds["by_fact"] and entangled["unknown"] < kinds["unknown"] - 0.2
    assert entangled["local"] > entangled["unknown"] + 0.1
    require_table(gate, figures)


def test_large():
    many_clients = bench("many_clients")
    figures = many_clients.measure({"tiny": [2]})
    assert figures["rows"][0]["num_clients"] == 2
    require_table(many_clients, figures)


def test_capacity():
    capacity = bench("capacity")
    sizes = TINY | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    figures = capacity.measure(2, (2, 4), (2, 5), sizes, rank=4)
    fp32, _, int8, _ = figures["dtypes"]
    assert int8["bytes"] < fp32["bytes"] / 2
    assert {store["objects_left"] for store in figures["store"]} == {0}
    two, five = figures["clients"]
    assert five["history_bytes"] == pytest.approx(2.5 * two["history_bytes"], rel=0.1)
    require_table(capacity, figures)


def test_long(monkeypatch):
    long_run = bench("long_run")
    monkeypatch.setattr(long_run, "FIRST_COUNTED_ROUND", 1)
    figures = long_run.measure(num_rounds=4, every=1)
    assert [entry["round"] for entry in figures["samples"]] == [0, 1, 2, 3, 4]
    require_table(long_run, figures)


@pytest.mark.slow  # in CI, unlike the others: who has a card for an hour must not find it broken
def test_gpu_on_a_cpu():
    gpu = bench("gpu")
    (run, *_) = gpu.choose_runs(None, None)
    figures = gpu.measure([run], "cpu", "tiny", num_steps=1)
    assert [phase["phase"] for phase in figures["rows"][0]["phases"]] == ["global", "local"] * 2
    require_table(gpu, figures)


def test_gpu_says_what_is_missing():
    gpu = bench("gpu")
    for arguments, text in (
        (("cuda", "7b"), "no CUDA device"),
        (("tpu", "7b"), "expected cuda or cpu"),
    ):
        if arguments[0] == "cuda" and gpu.torch.cuda.is_available():
            continue
        with pytest.raises(gpu.GpuBenchmarkError, match=text):
            gpu.measure(gpu.choose_runs(None, None), *arguments, num_steps=1)
    with pytest.raises(UserError, match="is not a size"):
        gpu.parse_memory("7 potatoes")


def test_warm():
    warm = bench("warm_client")
    figures = warm.measure(str(ROOT / "data" / "demo" / "base_model"), num_turns=1)
    for ways in figures["seconds"].values():
        assert 0 < ways[warm.WARM]["value"] < ways[warm.ANEW]["value"]
    require_table(warm, figures)
