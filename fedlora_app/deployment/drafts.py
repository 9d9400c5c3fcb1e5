"""The drafts of a site's two files, which its people complete: what is its own, what it permits."""

from __future__ import annotations

from typing import Any

from fedlora_app.config.schema import Config

CLIENT_FILE = """\
# What of this client is its own. It stays on this machine: the coordinator and the other sites
# see none of it. Relative paths are relative to this file.
id: "{client}"
store: store  # run directories with the local adapter go here
system_prompt: "You are the assistant of {client}."  # complete it

# Your data: JSON lists of {{"instruction": ..., "output": ...}}, see docs/data.md.
local_train: data/local_train.json
# local_validation: data/local_validation.json
# local_test: data/local_test.json
# universal_train: data/universal_train.json

# The base model is {base}.
model:
  name: "{base}"  # or a folder that holds it
  # quantization: auto  # 4bit on a GPU; none for the weights as they are
  # device: auto

# What fits this machine, where the experiment's own is too much for it.
# training: {{batch_size: 2, gradient_accumulation_steps: 4}}
"""


def draft_client_file(config: Config, client: str) -> str:
    """Return the draft of ``client.yaml``, with comments."""
    return CLIENT_FILE.format(client=client, base=config.model.name)


def draft_policy(config: Config, facts: dict[str, Any]) -> str:
    """Return the draft of ``policy.yaml``."""
    participants = ", ".join(facts["participants"])
    return (
        "# What this site permits. Edit it before you start; it is read at every round.\n"
        f'coordinator: "{facts["root"]}"\n'
        f'experiments: ["{config.experiment.name}"]\n'
        f"participants: [{participants}]\n"
        f"rounds: {config.federated.num_rounds}\n"
        f"code_sha256: {facts['code_sha256']}\n"
    )
