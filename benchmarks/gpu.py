"""Training of a model of Qwen2.5-7B's shape on a GPU: speed, memory, loading.

Random weights in NF4, two adapters, and the project's own training phases on examples as long as
the limit and on short ones; with the settings of the configuration for a 24 GB card, and with those
for 8 GB under a cap on what torch may allocate. Compared are the operations a second with the
card's peak, and the peak of the memory with the planner's prediction.

Each configuration is measured in a fresh process. ``--device cpu --shape tiny`` goes the same way
with a tiny model, to see that it works; its times say nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.plain_trainer import deterministic
from benchmarks.process import MIB
from benchmarks.random_nf4 import make_random_nf4
from benchmarks.toy_models import QWEN_7B, ROOT, build_examples, draw_lengths
from fedlora_app.config.loading import load_config
from fedlora_app.config.rounds import Phase, plan_round
from fedlora_app.config.schema import Config, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.adapters import AdaptedModel, attach_adapters
from fedlora_app.model.host_embedding import move_embedding_to_host
from fedlora_app.planning.gpus import find_card, parse_memory
from fedlora_app.planning.sizes import measure_sizes
from fedlora_app.planning.steps import SEED, measure_steps
from fedlora_app.training.activations import MicroBatch, Numerics, read_shape
from fedlora_app.training.batches import split_into_packs, step_batches, tokens_per_micro_batch
from fedlora_app.training.phase import TrainingError
from fedlora_app.training.phase_memory import BaseSizes, predict_phase

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SHAPES = {"7b": QWEN_7B, "tiny": TINY}
TINY_TRAINING = {"max_seq_length": 32, "batch_size": 2, "gradient_accumulation_steps": 2}
LARGE_CONFIG = "conf/qwen2.5-7b-4090.yaml"
SMALL_CONFIG, SMALL_CAP = "conf/qwen2.5-7b-8gb.yaml", "7.0GiB"


class GpuBenchmarkError(UserError):
    """The benchmark cannot run as asked; the message says why."""


@dataclass(frozen=True)
class Run:
    """A configuration, and how much of the card torch may allocate, such as "7.0GiB"."""

    config: str
    cap: str | None = None


def choose_runs(configs: Sequence[str] | None, cap: str | None) -> list[Run]:
    """Return the runs for named configurations, or else for both that come with the project."""
    if configs:
        return [Run(config, cap) for config in configs]
    return [Run(LARGE_CONFIG), Run(SMALL_CONFIG, cap or SMALL_CAP)]


def measure(runs: Sequence[Run], device: str, shape: str, num_steps: int) -> dict[str, Any]:
    """Measure every configuration in a process of its own.

    Raises:
        GpuBenchmarkError: the device, the shape, the cap or a configuration is not there.
    """
    if device not in ("cuda", "cpu") or shape not in SHAPES:
        raise GpuBenchmarkError(
            f"--device {device} --shape {shape}: expected cuda or cpu, and 7b or tiny."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise GpuBenchmarkError(
            "torch sees no CUDA device. Run this on a machine with an NVIDIA GPU, or go the same "
            "way on a CPU with: python -m benchmarks gpu --device cpu --shape tiny"
        )
    rows = []
    for run in runs:
        if run.cap is not None:
            parse_memory(run.cap)
        load_config(ROOT / run.config)
        arguments = json.dumps([asdict(run), device, shape, num_steps])
        command = [sys.executable, "-m", __spec__.name, arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{run}:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print("\n".join(_describe_run(rows[-1])), flush=True)  # a lent card may be gone soon
    return {
        "compared": "operations a second with the card's peak; memory with the plan's prediction",
        "device": rows[0]["device"],
        "shape": shape,
        "rows": rows,
    }


def describe(figures: dict[str, Any]) -> str:
    """Return what was measured, and on what."""
    lines = [
        f"Shape {figures['shape']}, random NF4 weights, on {figures['device']}; real tokens, "
        "operations without and with what checkpointing computes again"
    ]
    return "\n".join([*lines, *(line for row in figures["rows"] for line in _describe_run(row))])


def measure_here(run: Run, device_name: str, shape: str, num_steps: int) -> dict[str, Any]:
    """Measure one configuration in this process; call it in a fresh one."""
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device("cpu")
    config = load_config(ROOT / run.config)
    training = _settle(config.training, device, shape)
    config = config.model_copy(update={"training": training})
    applied_cap = _apply_cap(run.cap, device)
    model_config = Qwen2Config(**SHAPES[shape], bos_token_id=None, eos_token_id=None)
    embedding_on_cpu = config.model.embedding_device == "cpu"
    made = make_random_nf4(model_config, device)
    if embedding_on_cpu:
        move_embedding_to_host(made.model, device)
    model = attach_adapters(made.model, config.adapters)
    with torch.device("meta"):
        sizes = measure_sizes(Qwen2ForCausalLM(model_config), config.adapters)
    phases = []
    per_step = training.batch_size * training.gradient_accumulation_steps
    limit = training.max_seq_length
    for kind, lengths in (
        (f"{limit} tokens", [limit] * per_step),
        ("short", draw_lengths(per_step * (num_steps + 1), limit)),  # no step like another
    ):
        examples = build_examples(lengths, model_config.vocab_size)
        plan = plan_round(config, 1)
        for phase in (plan.train, plan.personalise):
            if phase is not None:
                about = {"examples": kind, "phase": phase.name}
                measured = _measure_phase(model, sizes, config, phase, examples, num_steps)
                predicted = _predict(
                    *(model_config, sizes, config, training, phase),
                    batches=list(_batches(examples, training, num_steps)),
                    checkpointing=measured["checkpointing"],
                )
                phases.append(about | measured | {"predicted_bytes": predicted})
    return {
        "config": run.config,
        "cap": run.cap,
        "applied_cap_bytes": applied_cap,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        "ranks": f"{config.adapters.global_.rank} and {config.adapters.local.rank}",
        "batch": f"{training.batch_size} x {training.gradient_accumulation_steps} sequences",
        "optimizer": training.optimizer,
        "embedding_on_cpu": embedding_on_cpu,
        "build_seconds": made.build_seconds,
        "load_seconds": made.load_seconds,
        "file_bytes": made.file_bytes,
        "phases": phases,
    }


def _describe_run(row: dict[str, Any]) -> Iterator[str]:
    cap = f", at most {row['cap']} for torch" if row["applied_cap_bytes"] else ""
    yield ""
    yield (
        f"{row['config']}: two adapters of rank {row['ranks']}, {row['batch']}, "
        f"{row['optimizer']}{cap}. Made in {row['build_seconds']:.1f} s; "
        f"{row['file_bytes'] / 1e9:.2f} GB of quantised weights read in "
        f"{row['load_seconds']:.1f} s."
    )
    yield ""
    yield (
        "| examples | phase | tokens a second | of the peak | with recomputation "
        "| checkpointing | peak memory, MiB | predicted, MiB | reserved, MiB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for phase in row["phases"]:
        yield _describe_phase(phase)


def _describe_phase(phase: dict[str, Any]) -> str:
    about = f"| {phase['examples']} | {phase['phase']} "
    predicted = phase["predicted_bytes"]
    shown = "not known" if predicted is None else f"{predicted / MIB:,.0f}"
    if phase["out_of_memory"]:
        return f"{about}| out of memory | | | {phase['checkpointing']} | | {shown} | |"
    shares = (phase["share_of_peak"], phase["share_of_peak_with_recomputation"])
    cells = ["not known" if share is None else f"{share:.1%}" for share in shares]
    return (
        f"{about}| {phase['tokens_per_second']:,.0f} | {' | '.join(cells)} "
        f"| {phase['checkpointing']} | {phase['peak_memory_bytes'] / MIB:,.0f} | {shown} "
        f"| {(phase['reserved_bytes'] or 0) / MIB:,.0f} |"
    )


def _settle(training: TrainingConfig, device: torch.device, shape: str) -> TrainingConfig:
    changes: dict[str, Any] = TINY_TRAINING if shape == "tiny" else {}
    if device.type != "cuda":
        changes = changes | {"optimizer": "adamw"}
    return training.model_copy(update=changes)


def _apply_cap(cap: str | None, device: torch.device) -> int | None:
    if cap is None or device.type != "cuda":
        return None
    wanted = parse_memory(cap)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / total), device)
    return wanted


def _measure_phase(
    model: AdaptedModel,
    sizes: BaseSizes,
    config: Config,
    phase: Phase,
    examples: Sequence[Example],
    num_steps: int,
) -> dict[str, Any]:
    shape = read_shape(model.get_base_model().config)
    try:
        with deterministic():
            steps = measure_steps(model, shape, sizes, config, phase, examples, num_steps)
    except TrainingError:
        return {"out_of_memory": True, "checkpointing": True}
    peak = _peak_flops(model.device)
    shares = [
        peak and round(flops / steps.seconds_per_step / peak, 4)
        for flops in (steps.flops_per_step, steps.recomputed_flops_per_step)
    ]
    return {
        "out_of_memory": False,
        "checkpointing": steps.settings.gradient_checkpointing is True,
        "tokens_per_step": round(steps.tokens_per_step, 1),
        "seconds_per_step": round(steps.seconds_per_step, 4),
        "tokens_per_second": round(steps.tokens_per_second, 1),
        "share_of_peak": shares[0],
        "share_of_peak_with_recomputation": shares[1],
        "peak_memory_bytes": steps.peak_bytes,
        "reserved_bytes": _reserved_bytes(model.device),
        "memory_retries": steps.memory_retries,
    }


def _batches(
    examples: Sequence[Example], training: TrainingConfig, num_steps: int
) -> list[list[Example]]:
    """Return the examples of every step of a phase; the first is not timed."""
    return list(islice(step_batches(examples, training, SEED), num_steps + 1))


def _reserved_bytes(device: torch.device) -> int | None:
    """Return what torch had taken from the card at most, with what it did not use of it."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def _peak_flops(device: torch.device) -> float | None:
    card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card and 1e12 * card.peak_tflops


def _predict(
    model_config: Qwen2Config,
    sizes: BaseSizes,
    config: Config,
    training: TrainingConfig,
    phase: Phase,
    batches: Sequence[Sequence[Example]],
    checkpointing: bool,
) -> int | None:
    """Return what ``fedlora plan`` predicts torch to allocate; None where it cannot."""
    budget = tokens_per_micro_batch(training)
    packs = [pack for batch in batches for pack in split_into_packs(batch, budget)]
    largest = max(packs, key=lambda pack: sum(len(example.input_ids) for example in pack))
    batch = MicroBatch(
        sum(len(example.input_ids) for example in largest),
        sum(example.num_answer_tokens for example in largest),
    )
    on_cpu = config.model.embedding_device == "cpu"
    return predict_phase(
        *(read_shape(model_config), sizes, config.adapters, training),
        *(Numerics(True, 2, on_cpu), phase, batch, checkpointing),
    ).torch_bytes


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a client has them
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    run, *rest = json.loads(sys.argv[1])
    print(json.dumps(measure_here(Run(**run), *rest)))
