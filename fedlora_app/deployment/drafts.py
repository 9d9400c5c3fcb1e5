"""The drafts of a site's two files, which its people complete: what is its own, what it permits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedlora_app.config.schema import Config

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
# What this site permits, whoever asks. A line that is removed permits everything.
# Read each before you start; docs/deployment.md has all rules. What is refused stands in the log.
coordinator: {root}
experiments: [{experiment}]
participants: [{participants}]
rounds: {rounds}
modes: [{mode}]
adapter_rank: {rank}
update_dtypes: [{dtype}]
code_sha256: {code}
{base}
# least_others: {others}  # of other clients in every average with this one's update
# steps: 1000  # of training in a round
# seconds: 3600  # of work for one message
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
    """Return the draft of ``policy.yaml``: what the experiment asks for now, and no more.

    Args:
        facts: the content of ``package.json``.
    """
    adapters, fingerprint = config.adapters, facts["base"]["fingerprint"]
    return POLICY.format(
        root=json.dumps(facts["root"]),
        experiment=json.dumps(facts["experiment"]),
        participants=", ".join(map(json.dumps, facts["participants"])),
        rounds=config.federated.num_rounds,
        mode=config.federated.mode,
        rank=max(adapters.global_.joint.rank, adapters.local.rank),
        dtype=config.federated.upload_dtype,
        code=json.dumps(facts["code_sha256"]),
        base=f'base_sha256: "{fingerprint}"' if fingerprint else "# base_sha256:",
        others=max(1, len(facts["participants"]) - 1),
    )
