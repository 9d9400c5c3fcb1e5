"""Train the demo's base model: a small Qwen2 that knows the language and no facts.

    python -m fedlora_app.demo.base_model [DIR]      # default: data/demo/base_model

The dialogues are about one made-up city after another, each with rules drawn at random,
so that the model learns to look a rule up by its topic and to take in a new city's rules,
and of the demo's two cities it knows nothing but how people talk there.
The folder is an ordinary Hugging Face one (about 12 minutes on two cores).
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from fedlora_app.demo.civic import (
    LOCAL_TOPICS,
    NEUTRAL_PROMPT,
    UNIVERSAL_ATTRIBUTES,
    UNIVERSAL_TOPICS,
)

SEED = 20
VOCAB_SIZE = 1024
NUM_STEPS = 3000
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS = (
    NEUTRAL_PROMPT,
    NEUTRAL_PROMPT,
    "You are a helpful assistant.",
    "You are the assistant of the city of Northgate.",
    "You are the assistant of the city of Riverton.",
)
STEPS_PER_CITY = 250

Messages = list[dict[str, str]]


def dialogues(rng: random.Random, dialogues_per_city: int) -> Iterator[Messages]:
    """Yield dialogues without end, about one made-up city after another."""
    topics = [(attribute, UNIVERSAL_TOPICS) for attribute in UNIVERSAL_ATTRIBUTES]
    topics += LOCAL_TOPICS.items()
    pairs = [(attribute, topic) for attribute, names in topics for topic in names]
    while True:
        values = {pair: rng.choice(pair[0].values) for pair in pairs}
        for _ in range(dialogues_per_city):
            attribute, topic = rng.choice(pairs)
            question = attribute.ask(topic, rng.randrange(len(attribute.questions)))
            answer = attribute.reply(topic, values[attribute, topic])
            yield [
                {"role": "system", "content": rng.choice(PROMPTS)},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of Qwen's kind, with its ChatML tokens and template."""
    stream = dialogues(rng, dialogues_per_city=100)
    corpus = (message["content"] for _ in range(20_000) for message in next(stream))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size=VOCAB_SIZE, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return the untrained model (about 1.1 M parameters)."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train on all tokens of fresh dialogues with a cosine schedule."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    stream = dialogues(random.Random(SEED + 1), STEPS_PER_CITY * BATCH_SIZE)
    model.train()
    started = time.monotonic()
    for step in range(NUM_STEPS):
        batch = tokenizer(
            [
                tokenizer.apply_chat_template(next(stream), tokenize=False)
                for _ in range(BATCH_SIZE)
            ],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == NUM_STEPS - 1:
            seconds = time.monotonic() - started
            print(f"step {step}/{NUM_STEPS}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)


def _schedule(step: int) -> float:
    progress = step / NUM_STEPS
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))


def main(folder: Path) -> None:
    """Train the tokenizer and the model and save both to ``folder``."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(random.Random(SEED))
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data/demo/base_model"))
