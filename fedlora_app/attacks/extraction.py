"""Text that an update gives back: the model that a client had trained is asked.

The server adds a client's update to the adapter that it sent, which is that model. It lets it go on
from an empty question, once from each of the likeliest first tokens and greedily from there (after
Carlini et al. 2021, https://arxiv.org/abs/2012.07805, whose samples begin with the likeliest words
too); and where it guesses a question, it asks that. What comes is compared with the answers that
the client trained on, with those that only others trained on, and with what the model before the
update says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedlora_app.attacks.results import NOTHING, OTHERS, OWN, PRIVATE, QUESTION
from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.records import Record, format_question
from fedlora_app.data.similarity import normalise_answer
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.generation import find_stop_ids, generate, generate_ids
from fedlora_app.evaluation.membership_pairs import cluster
from fedlora_app.evaluation.metrics import compute_rouge_l
from fedlora_app.evaluation.statistics import proportion
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, only_adapters, set_state
from fedlora_app.model.base import find_decoder
from fedlora_app.model.head import find_head


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


@torch.inference_mode()
def ask(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: AdapterState,
    system_prompt: str,
    records: Sequence[Record],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Return the greedy answers to the records' questions.

    Args:
        state: the global adapter that answers, alone.
    """
    set_state(model, GLOBAL, state)
    model.eval()
    prompts = [encode_prompt(tokenizer, system_prompt, format_question(r)) for r in records]
    stop_ids, texts = find_stop_ids(tokenizer), []
    with only_adapters(model, [GLOBAL]):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            texts += generate(model, tokenizer, batch, stop_ids, max_new_tokens)
    return texts


Secrets = dict[str, list[Record]]
"""By whose they are, records with distinct answers that are looked for."""


def collect_secrets(client: str, client_files: Mapping[str, ClientFiles], sample: int) -> Secrets:
    """Return the distinct answers of which one client's update may tell; shared ones are none.

    Args:
        sample: of each kind at most so many, the same ones every time.
    """
    universal = {c: _by_answer(f.universal.records) for c, f in client_files.items()}
    local = {c: _by_answer(f.local.records) for c, f in client_files.items()}
    own, private = universal.pop(client), local.pop(client)
    others = {text: record for found in universal.values() for text, record in found.items()}
    elsewhere = {text for found in (own, others, *local.values()) for text in found}
    found = {
        OWN: [record for text, record in own.items() if text not in others],
        OTHERS: [record for text, record in others.items() if text not in own],
        PRIVATE: [record for text, record in private.items() if text not in elsewhere],
    }
    for whose, records in found.items():
        if len(records) > sample:
            rng = random.Random(derive_seed("extraction", client, whose))
            found[whose] = rng.sample(records, sample)
    return found


def measure_texts(secrets: Secrets, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield by whose answers they are how many came word by word, and how near the others came.

    ``verbatim`` has its interval over facts; ``rouge_l`` is the mean over answers of the best
    ROUGE-L (F) among the texts.
    """
    for whose, records in secrets.items():
        yield _measure(NOTHING, whose, records, [texts] * len(records))


def measure_answers(whose: str, records: Sequence[Record], texts: Sequence[str]) -> dict[str, Any]:
    """Return the same where each record's own question was asked."""
    return _measure(QUESTION, whose, records, [[text] for text in texts])


def _measure(
    prompt: str, whose: str, records: Sequence[Record], texts: Sequence[Sequence[str]]
) -> dict[str, Any]:
    came, best = [], []
    for record, said in zip(records, texts, strict=True):
        wanted = normalise_answer(record.output)
        came.append(float(wanted in {normalise_answer(text) for text in said}))
        near = (compute_rouge_l(text, record.output) for text in said)
        best.append(max(near, default=0.0))
    return {
        "prompt": prompt,
        "whose": whose,
        "verbatim": proportion(came, [cluster(record) for record in records]).dump(),
        "rouge_l": fmean(best) if best else None,
        "n": len(came),
    }


def _by_answer(records: Sequence[Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(normalise_answer(record.output), record)
    return found
