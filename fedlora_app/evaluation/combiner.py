"""What combines a client's two adapters at inference: how much of each answers which question.

``y = W0 x + w_G s_G B_G A_G x + w_L lambda s_L B_L A_L x``. A combiner says the weights (w_G, w_L)
of each question. It is fitted by a client to its own data, and stays where its local adapter stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.model.adapters import AdaptedModel, scaled_adapters
from fedlora_app.model.fused import Mixer, fused_answering


class Weights(NamedTuple):
    """The factors of what the two adapters of a pair add."""

    of_global: float
    of_local: float


WHOLE_PAIR = Weights(1.0, 1.0)
GLOBAL_ALONE = Weights(1.0, 0.0)

ByWeights = Sequence[tuple[Weights, Sequence[int]]]
"""Weights with the places of the prompts that they are for."""


def encode_judged(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str
) -> list[int]:
    """Return the prompt by which a question is judged: white space around it says nothing."""
    return encode_prompt(tokenizer, system_prompt, question.strip())


class Combiner:
    """Weighs a pair's adapters by the question, whatever prompt it is asked with."""

    system_prompt: str
    """The client's own, under which questions are judged."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """Return the prompt by which a question is judged."""
        return encode_judged(tokenizer, self.system_prompt, question)

    def find_weights(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> list[Weights]:
        """Return the weights of each prompt."""
        raise NotImplementedError

    def find_mixer(self, model: AdaptedModel) -> Mixer | None:
        """Return what weighs the adapters by layer and token, too; None: nothing does."""
        return None

    def find_openness(
        self, model: AdaptedModel, prompts: Sequence[list[int]]
    ) -> list[float] | list[None]:
        """Return how sure a gate is that each prompt is the client's own; None where there is none.

        In [0, 1]. One that is not a gate takes no such decision, which an answer could be due to.
        """
        return [None] * len(prompts)


def group_by_weights(
    model: AdaptedModel, combiner: Combiner | None, prompts: Sequence[list[int]]
) -> ByWeights:
    """Return each pair of weights with the places of the prompts that it is for.

    Prompts of other weights never share a forward pass: a mixture of experts mixes the rows of a
    batch, so that factors for each row could not follow them.
    """
    if combiner is None:
        return [(WHOLE_PAIR, range(len(prompts)))]
    groups: dict[Weights, list[int]] = {}
    for place, weights in enumerate(combiner.find_weights(model, prompts)):
        groups.setdefault(weights, []).append(place)
    return sorted(groups.items())


@contextmanager
def combined_answering(model: AdaptedModel, combiner: Combiner | None) -> Iterator[None]:
    """Answer with the active adapters fused in the block, by the token where a combiner does so.

    What it weighs by the question is for ``weighted_pair``.
    """
    with fused_answering(model, None if combiner is None else combiner.find_mixer(model)):
        yield


@contextmanager
def weighted_pair(model: AdaptedModel, weights: Weights) -> Iterator[None]:
    """Multiply what the two adapters add, beside any scale, while the block runs."""
    with scaled_adapters(model, {GLOBAL: weights.of_global, LOCAL: weights.of_local}):
        yield
