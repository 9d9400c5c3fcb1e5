"""Text that an update gives back: the client's model is asked nothing, and answers.

The server adds a client's update to the adapter that it sent, which is the model that the client
had trained, and lets it go on from an empty question: once from each of the likeliest first tokens,
greedily from there (after Carlini et al. 2021, https://arxiv.org/abs/2012.07805, whose samples
begin with the likeliest words too). What comes is compared with the answers that the client trained
on, with those that only others trained on, and with what the model before the update says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.records import Record
from fedlora_app.data.similarity import normalise_answer
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.generation import find_stop_ids, generate_ids
from fedlora_app.evaluation.membership_pairs import cluster
from fedlora_app.evaluation.statistics import proportion
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, only_adapters, set_state
from fedlora_app.model.base import find_decoder
from fedlora_app.model.head import find_head

OWN, OTHERS, PRIVATE = "own", "others", "private"
WHOSE = {
    OWN: "universal answers that only this client trained on",
    OTHERS: "universal answers that only other clients trained on",
    PRIVATE: "this client's local answers",
}


@torch.inference_mode()
def elicit(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: AdapterState,
    system_prompt: str,
    *,
    number: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Return what the model says to nothing, beginning with each of the likeliest first tokens.

    Args:
        state: the global adapter that answers, alone.
        number: of first tokens.
    """
    set_state(model, GLOBAL, state)
    model.eval()
    prompt = encode_prompt(tokenizer, system_prompt, "")
    stop_ids = find_stop_ids(tokenizer)
    texts: list[str] = []
    with only_adapters(model, [GLOBAL]):
        base = model.get_base_model()
        ids = torch.tensor([prompt], device=model.device)
        hidden = find_decoder(base)(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        logits = find_head(base)(hidden)[0, : len(tokenizer)].float()
        logits[stop_ids] = -torch.inf
        firsts = logits.topk(min(number, len(logits))).indices.tolist()
        for start in range(0, len(firsts), batch_size):
            batch = firsts[start : start + batch_size]
            rest = generate_ids(
                model, tokenizer, [[*prompt, t] for t in batch], stop_ids, max_new_tokens
            )
            texts += [decode(tokenizer, [t, *ids]) for t, ids in zip(batch, rest, strict=True)]
    return texts


@dataclass(frozen=True)
class Secrets:
    """The answers that are looked for, by whose they are, each with its fact."""

    answers: Mapping[str, Mapping[str, str]]


def collect_secrets(client: str, client_files: Mapping[str, ClientFiles]) -> Secrets:
    """Return the distinct answers of which one client's update may tell; shared ones are none."""
    by_client = {c: _by_answer(f.universal.records) for c, f in client_files.items()}
    local = {c: _by_answer(f.local.records) for c, f in client_files.items()}
    own = by_client.pop(client)
    others = {text: fact for found in by_client.values() for text, fact in found.items()}
    private = local.pop(client)
    elsewhere = {*others, *(text for found in local.values() for text in found)}
    return Secrets(
        {
            OWN: {text: fact for text, fact in own.items() if text not in others},
            OTHERS: {text: fact for text, fact in others.items() if text not in own},
            PRIVATE: {t: f for t, f in private.items() if t not in own and t not in elsewhere},
        }
    )


def measure_extraction(secrets: Secrets, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield by whose answers they are how many came word by word, and how near the others came.

    ``verbatim`` has its interval over facts; ``rouge_l`` is the mean over answers of the best
    ROUGE-L (F) among the texts.
    """
    said = {normalise_answer(text) for text in texts}
    scorer = RougeScorer(["rougeL"])
    for whose, answers in secrets.answers.items():
        came = [float(normalise_answer(answer) in said) for answer in answers]
        best = [
            max((scorer.score(answer, text)["rougeL"].fmeasure for text in texts), default=0.0)
            for answer in answers
        ]
        yield {
            "whose": whose,
            "verbatim": proportion(came, list(answers.values())).dump(),
            "rouge_l": fmean(best) if best else None,
            "n": len(came),
        }


def _by_answer(records: Sequence[Record]) -> dict[str, str]:
    found: dict[str, str] = defaultdict(str)
    for record in records:
        found.setdefault(record.output.strip(), cluster(record))
    return dict(found)
