"""The drafts of a site's two files, which its people complete: what is its own, what it permits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fedlora_app.config.privacy import has_noise
from fedlora_app.config.schema import AVERAGING_MODES, GLOBAL, Config
from fedlora_app.deployment.policy import count_sure_others
from fedlora_app.deployment.privacy_rule import compute_spending

SHARED_SETS = ("universal_test", "universal_validation", "conflict_test", "conflict_validation")
"""Question sets that all clients answer, each with its own copy."""
CLIENT_FILE = """\
# What of this client is its own. It stays on this machine: neither the coordinator nor another site
# sees any of it. Paths are relative to this file. docs/deployment.md explains every key.
id: {client}
store: store  # run directories go here, and in them the local adapter
system_prompt: "You are the assistant of ..."  # complete it

# Your data, as docs/data.md describes it. Of these two both are needed.
local_train: data/local_train.json
universal_train: data/universal_train.json
# local_validation: data/local_validation.json
# local_test: data/local_test.json
{shared}
# The base model is {base}. Its folder here, and how it is held:
# model:
#   name: /models/base
#   quantization: 4bit  # none: the weights as they are

# What fits this machine. The examples of a step stay those of the experiment ({per_step}).
# training: {{batch_size: 2}}
# evaluation: {{batch_size: 8}}
"""
POLICY = """\
# What this site permits, whoever asks: its client holds every message against these rules before
# it does anything of it, and every reply before it leaves. This draft permits what the experiment
# asks for now, and no more. A rule that is left out permits everything; docs/deployment.md has all.
coordinator: {coordinator}  # SHA-256 of package/root.crt: compare it over the phone
experiments: {experiments}
participants: {participants}  # who may take part, this site among them
least_others: {least_others}  # so many others' updates are in every average with this site's
rounds: {rounds}
modes: {modes}
schedules: {schedules}  # mixed and joint send what was trained on local records
adapter_rank: {adapter_rank}  # at most
target_modules: {target_modules}
update_dtypes: {update_dtypes}
privacy: {privacy}  # how what this site sends is protected, at least
max_norm_ratio: {max_norm_ratio}  # this client looks at what the server sends
losses: {losses}  # of these phases losses may leave; others, and margins, tell of local records
# update_parameters: 40370176   # numbers in an update, at most
# send_update: false            # refuse what would have this site send an update
# metrics: ["*"]                # figures that may leave, as patterns; a reply with others does not
# facts: ["*"]                  # such as "sha256/*", "device", "base_model"
code_sha256: {code_sha256}  # of the fedlora-app that is installed here
base_sha256: {base_sha256}  # of the base model
# steps: 500                    # optimizer steps in a round, at most
# seconds: 7200                 # of work for one message; a round has two
"""


def draft_client_file(config: Config, client: str) -> str:
    """Return the draft of ``client.yaml``, with comments."""
    named = [key for key in SHARED_SETS if getattr(config.data, key, None) is not None]
    sets = "\n".join(f"#   {key}: data/{key}.json" for key in named)
    training = config.training
    return CLIENT_FILE.format(
        client=json.dumps(client),
        shared=f"\n# Questions that all clients answer, where you have them.\n# data:\n{sets}\n"
        if named
        else "",
        base=json.dumps(config.model.name),
        per_step=training.batch_size * training.gradient_accumulation_steps,
    )


def draft_policy(config: Config, facts: Mapping[str, Any]) -> str:
    """Return the text of ``policy.yaml`` for a package, with comments.

    Args:
        facts: what ``package.json`` says. Of it ``root`` (fingerprint of the root certificate),
            ``participants``, ``code_sha256`` and ``base`` (with ``fingerprint``) are used; what is
            unknown permits everything.
    """
    adapters, federated = config.adapters, config.federated
    participants = sorted(set(facts.get("participants") or ()) | set(config.client_ids))
    modules: set[str] = set()
    for adapter in (adapters.global_, adapters.local):
        named = adapter.target_modules
        modules |= {named} if isinstance(named, str) else set(named)
    ranks = (adapters.global_.joint.rank, adapters.local.joint.rank)
    values = {
        "coordinator": facts.get("root"),
        "experiments": [config.experiment.name],
        "participants": participants,
        "least_others": _find_least_others(config),
        "rounds": federated.num_rounds,
        "modes": [federated.mode],
        "schedules": [config.training.schedule],
        "adapter_rank": max(ranks),
        "target_modules": sorted(modules),
        "update_dtypes": [federated.upload_dtype],
        "privacy": _find_privacy(config),
        "max_norm_ratio": federated.max_norm_ratio,
        # The update tells more of the records behind it than the loss does, unless it is hidden.
        "losses": [GLOBAL] if config.privacy.unit == "none" else [],
        "code_sha256": facts.get("code_sha256"),
        "base_sha256": (facts.get("base") or {}).get("fingerprint"),
    }
    # JSON is YAML, and quotes what YAML would read as something else: ids such as "no", hashes.
    text = POLICY.format(**{key: json.dumps(value) for key, value in values.items()})
    for key in (key for key, value in values.items() if value is None):  # not known: no rule
        text = text.replace(f"\n{key}: null", f"\n# {key}:")
    return text


def _find_least_others(config: Config) -> int | None:
    """Return what is sure in every round of the experiment, None where that is nobody."""
    federated = config.federated
    if federated.mode not in AVERAGING_MODES:
        return None
    rounds = range(1, federated.num_rounds + 1)
    return max(0, min(count_sure_others(config, number) for number in rounds)) or None


def _find_privacy(config: Config) -> dict[str, Any] | None:
    """Return the protection that an experiment has, None where it has none."""
    privacy = config.privacy
    if privacy.unit == "none":
        return None
    rule: dict[str, Any] = {"unit": [privacy.unit]}
    if not has_noise(privacy):
        return rule
    if privacy.unit == "record" or privacy.noise == "client":
        rule["noise"] = "client"
    if privacy.epsilon is not None:
        rule |= {"epsilon": privacy.epsilon, "delta": privacy.delta}
    elif privacy.unit == "client" and privacy.delta is not None:
        spent = (compute_spending(config, c, (0, 0), privacy.delta) for c in config.client_ids)
        rule |= {"epsilon": math.ceil(max(spent) * 1000) / 1000, "delta": privacy.delta}
    # With a multiplier a record's epsilon depends on how many a site has, which it alone knows.
    return rule
