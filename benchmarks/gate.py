"""What the gate opens for, where local and universal questions are hard to tell apart.

A gate is fitted to a client's training questions and asked about held-out wordings of its local
facts, of universal facts that it trains on, and of universal facts that it never saw. The settings:

- *kinds apart*: the demo's cities, whose universal and local questions are about other matters;
- *other topics*: the same wordings throughout, and each topic (a passport, a visa) is local,
  universal or unknown;
- *other facts*: likewise, but single facts (the fee of a passport) are, so that no topic decides;
- *few*: other topics, of which 5 facts a kind are trained on; *one wording*: without paraphrases;
- *new style*: other topics, asked in a chatty style that no training question has;
- *Chinese*: other topics.

Each for the gate as it is and for one that compares kinds only, as the first gate did.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedlora_app.config.schema import AdaptersConfig, ModelConfig
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.demo.civic import (
    DOCUMENT,
    DURATION,
    FEE,
    LOCAL_TOPICS,
    NEUTRAL_PROMPT,
    OFFICE,
    UNIVERSAL_TOPICS,
    Attribute,
)
from fedlora_app.evaluation.gate import Features
from fedlora_app.evaluation.gate_fit import FactFeatures, separate
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.model.adapters import attach_adapters
from fedlora_app.model.base import LoadedModel, load_base_model

TRAINED, HELD_OUT = range(6), (7, 8)
ATTRIBUTES = (FEE, DURATION, DOCUMENT, OFFICE)
CHATTY = {
    "fee": "hey quick one, {topic}, whats that gonna cost me these days??",
    "duration": "so i sent off for {topic} ages ago lol, any idea when it turns up?",
    "document": "ok what stuff do i gotta drag along to sort out {topic}, help pls",
    "office": "hiya! {topic}, which counter do i run to again?",
}
CHINESE_TOPICS = (
    *("护照", "身份证", "驾驶证", "出生证明", "结婚证", "钓鱼许可证"),
    *("工作许可", "旅行签证", "车辆登记", "养老金卡", "营业执照", "船舶登记"),
)
CHINESE = (
    Attribute(
        "fee",
        (
            *("办理{topic}要多少钱?", "{topic}的费用是多少?", "我需要{topic},要付多少?"),
            *("请告诉我{topic}的价格。", "办{topic}应该带多少钱?", "窗口办理{topic}收费多少?"),
            *("{topic}贵吗?", "我想申请{topic},费用高不高?", "办一个{topic}会收我多少钱?"),
        ),
        "{topic}的费用是{value}元。",
        ("12",),
    ),
    Attribute(
        "duration",
        (
            *("办理{topic}需要多久?", "{topic}什么时候能好?", "{topic}要等几天?"),
            *("我申请了{topic},还要等多久?", "{topic}的等待时间是多长?", "最快多久能拿到{topic}?"),
            *("多快能收到{topic}?", "{topic}通常的处理时间是多少?", "我订了{topic},何时可以取?"),
        ),
        "{topic}的等待时间是{value}天。",
        ("3",),
    ),
    Attribute(
        "office",
        (
            *("在哪里办理{topic}?", "哪个部门负责{topic}?", "我可以去哪里申请{topic}?"),
            *("我需要{topic},该去哪里?", "{topic}由谁发放?", "为了{topic}我要去什么地方?"),
            *("{topic}的主管机关是哪个?", "{topic}在哪里签发?", "我在找办{topic}的地方,是哪一处?"),
        ),
        "办理{topic}的地方是{value}。",
        ("市政厅",),
    ),
)
"""Questions about made-up rules; the values are not used."""
FAR = (
    "Write a poem about the sea.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Explain photosynthesis in two sentences.",
    "How do I boil an egg?",
    "Translate good morning into French.",
    "Fix the bug in this Python function.",
    "What should I cook tonight?",
)
"""Questions of another world, for which no gate should open."""


@dataclass(frozen=True)
class Asked:
    """Questions of one fact: to train on, and to be asked with."""

    trained: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What a client trains on, and facts that it knows nothing of."""

    name: str
    local: list[Asked]
    universal: list[Asked]
    unknown: list[Asked]


def build_settings(num_splits: int) -> Iterator[Setting]:
    """Yield every setting, those with a choice of topics once per split."""
    universal = [_ask(a, t) for t in UNIVERSAL_TOPICS for a in ATTRIBUTES]
    policies = [_ask(a, topic) for a, topics in LOCAL_TOPICS.items() for topic in topics]
    for split in range(num_splits):
        yield Setting("kinds apart", policies, *_divide(universal, split, parts=2))
        topics = _divide(UNIVERSAL_TOPICS, split)
        by_topic = [[_ask(a, t) for t in part for a in ATTRIBUTES] for part in topics]
        entangled = Setting("other topics", *by_topic)
        yield entangled
        yield Setting("other facts", *_divide(universal, split))
        yield _cut(entangled, "few", num_facts=5)
        yield _cut(entangled, "one wording", num_wordings=1)
        chatty = [[_ask_chattily(a, t) for t in part for a in ATTRIBUTES] for part in topics]
        yield Setting("new style", *chatty)
        topics = _divide(CHINESE_TOPICS, split)
        yield Setting("Chinese", *([_ask(a, t) for t in part for a in CHINESE] for part in topics))


def measure(model: str, num_splits: int = 4, root: Path = Path()) -> dict[str, Any]:
    """Fit gates in every setting and return the shares of questions that they open for.

    Args:
        model: a hub id or a folder.
    """
    config = ModelConfig(name=model, quantization="none")
    loaded = load_base_model(config, root)
    settings = list(build_settings(num_splits))
    questions = sorted({q for s in settings for q in _all_questions(s)} | set(FAR))
    features, tokens = _compute(loaded, questions)
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for setting in settings:
        for way, by_fact in (("gate", None), ("kinds only", False)):
            rows.setdefault((setting.name, way), []).append(
                _try(setting, features, tokens, by_fact)
            )
    return {
        "model": Path(model).name,
        "splits": num_splits,
        "rows": [
            {"setting": name, "way": way, **{key: fmean(t[key] for t in tried) for key in tried[0]}}
            for (name, way), tried in rows.items()
        ],
    }


def describe(result: dict[str, Any]) -> str:
    """Return the table of a measurement."""
    lines = [
        f"Questions that a gate opens for, %, with {result['model']}; means over "
        f"{result['splits']} splits. It should open for local ones only.",
        "",
        "| setting | way | local | universal, seen | never seen | far | compares facts |",
        "|---" * 7 + "|",
    ]
    for row in result["rows"]:
        shares = (f"{100 * row[k]:.0f}" for k in ("local", "seen", "unknown", "far", "by_fact"))
        lines.append(f"| {row['setting']} | {row['way']} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _ask(attribute: Attribute, topic: str) -> Asked:
    trained, asked = (
        tuple(attribute.ask(topic, number) for number in numbers) for numbers in (TRAINED, HELD_OUT)
    )
    return Asked(trained, asked)


def _ask_chattily(attribute: Attribute, topic: str) -> Asked:
    return replace(_ask(attribute, topic), asked=(CHATTY[attribute.name].format(topic=topic),))


def _divide(items: Sequence[Any], seed: int, parts: int = 3) -> list[list[Any]]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return [shuffled[part::parts] for part in range(parts)]


def _cut(
    setting: Setting, name: str, num_facts: int | None = None, num_wordings: int | None = None
) -> Setting:
    """Return a setting of which the client has less to train on."""
    local, universal = (
        [replace(fact, trained=fact.trained[:num_wordings]) for fact in facts[:num_facts]]
        for facts in (setting.local, setting.universal)
    )
    return replace(setting, name=name, local=local, universal=universal)


def _all_questions(setting: Setting) -> Iterator[str]:
    for fact in (*setting.local, *setting.universal, *setting.unknown):
        yield from (*fact.trained, *fact.asked)


def _compute(
    loaded: LoadedModel, questions: Sequence[str]
) -> tuple[dict[str, Features], dict[str, frozenset[int]]]:
    adapters = AdaptersConfig.model_validate({"global": {"rank": 1}, "local": {"rank": 1}})
    model = attach_adapters(loaded.model, adapters)
    prompts = [encode_prompt(loaded.tokenizer, NEUTRAL_PROMPT, q) for q in questions]
    features = zip(*compute_features(model, prompts), strict=True)
    tokens = map(frozenset, prompts)
    return dict(zip(questions, features, strict=True)), dict(zip(questions, tokens, strict=True))


def _try(
    setting: Setting,
    features: dict[str, Features],
    tokens: dict[str, frozenset[int]],
    by_fact: bool | None,
) -> dict[str, float]:
    def look_up(questions: Sequence[str]) -> Features:
        return tuple(map(torch.stack, zip(*(features[q] for q in questions), strict=True)))

    facts = [
        FactFeatures(is_local, look_up(fact.trained), tuple(map(tokens.get, fact.trained)))
        for is_local, kind in ((True, setting.local), (False, setting.universal))
        for fact in kind
    ]
    gate = separate(facts, by_fact)
    asked = {
        "local": [q for fact in setting.local for q in fact.asked],
        "seen": [q for fact in setting.universal for q in fact.asked],
        "unknown": [q for fact in setting.unknown for q in fact.asked],
        "far": list(FAR),
    }
    shares = {
        k: (gate.judge(look_up(v), list(map(tokens.get, v))) > 0.5).double().mean().item()
        for k, v in asked.items()
    }
    return shares | {"by_fact": float(gate.figures.by_fact)}
