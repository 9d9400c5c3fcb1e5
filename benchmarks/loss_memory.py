"""Peak memory of the loss: full logits, as transformers takes it, against ours.

Counted is what lies behind the last hidden states: every live tensor that the forward and the
backward pass to the hidden states make, and nothing that was there before. A dispatch mode follows
the tensors' storages, which is what torch counts on a GPU; what an operation holds only while it
runs is not seen. Full logits go to fp32 before the cross-entropy, as in transformers. Both get
answer positions only, which is kind to the full logits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.process import MIB
from benchmarks.toy_models import use_tests
from fedlora_app.training.losses import LOGIT_ROWS, token_losses

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FULL, OURS = "full logits", "ours"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

Loss = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def measure(
    positions: int = 1024, hidden_size: int = 1024, vocabulary: int = 152_064
) -> dict[str, Any]:
    """Measure both ways in both dtypes, on the same numbers."""
    rows = []
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        head = torch.nn.Linear(hidden_size, vocabulary, bias=False).requires_grad_(False).to(dtype)
        hidden = torch.randn(positions, hidden_size).to(dtype)
        targets = torch.randint(vocabulary, (positions,))
        peaks, results = {}, {}
        for way, loss in ((FULL, _full_loss), (OURS, _our_loss)):
            peaks[way], results[way] = _measure_peak(loss, head, hidden, targets)
        difference = max(
            ((ours - full).norm() / full.norm()).item()
            for ours, full in zip(results[OURS], results[FULL], strict=True)
        )
        if difference > TOLERANCE[name]:
            raise RuntimeError(f"{name}: loss or gradient differ by {difference} of their norm.")
        rows.append(
            {
                "dtype": name,
                "peak_bytes": peaks,
                "share_of_full": round(peaks[OURS] / peaks[FULL], 4),
                "relative_difference": difference,
            }
        )
        print(f"{name}: {peaks[OURS] / peaks[FULL]:.1%} of full logits' peak", flush=True)
    return {
        "compared": "peak of live tensors behind the hidden states, forward and backward",
        "positions": positions,
        "hidden_size": hidden_size,
        "vocabulary": vocabulary,
        "rows_at_a_time": LOGIT_ROWS,
        "rows": rows,
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the peaks as a table."""
    lines = [
        f"{figures['positions']:,} answer positions, vocabulary {figures['vocabulary']:,}, hidden "
        f"size {figures['hidden_size']:,}",
        "",
        "| dtype of the model | full logits, MiB | ours, MiB | share |",
        "|---|---|---|---|",
    ]
    for row in figures["rows"]:
        full, ours = (row["peak_bytes"][way] / MIB for way in (FULL, OURS))
        lines.append(f"| {row['dtype']} | {full:,.0f} | {ours:,.0f} | {row['share_of_full']:.1%} |")
    return "\n".join(lines)


def _measure_peak(
    loss: Loss, head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[int, list[torch.Tensor]]:
    """Return the peak in bytes, and the loss and its gradient in fp32."""
    use_tests()
    from live_memory import LiveMemory

    gc.collect()
    leaf = hidden.clone().requires_grad_(True)
    with LiveMemory() as memory:
        value = loss(head, leaf, targets)
        value.backward()
    return memory.peak, [value.detach(), leaf.grad.float()]


def _full_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(hidden).float(), targets)


def _our_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_losses(head, hidden, targets).mean()
