"""What a site permits, whoever asks: a file that its client holds every message against.

A rule that is left out permits everything. What asks for more is refused before anything of it is
done, and a reply that holds more does not leave, but for losses, which are only left out of it. The
server is told the names of the rules, this machine's log the whole. Only a site's own installed
code makes this a protection: whoever sends the code that reads a policy could send code that does
not.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from fedlora_app.config.faults import describe_faults, list_faults
from fedlora_app.config.loading import read_yaml
from fedlora_app.config.participation import training_clients
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import AVERAGING_MODES, Config, ConfigError, Section
from fedlora_app.deployment.client_file import ConfidentialError
from fedlora_app.deployment.privacy_rule import PrivacyRule, find_privacy_fault
from fedlora_app.foundation.project import hash_package

if TYPE_CHECKING:  # which imports torch
    from fedlora_app.model.adapter_state import AdapterState

HEX = "0123456789abcdef"
SHA256_LENGTH = 64
Dtype = Literal["float32", "bfloat16", "int8", "nf4"]
Mode = Literal["dual", "fedavg", "finetuned", "local-only", "centralized"]
Schedule = Literal["phased", "mixed", "joint"]
Trained = Literal["global", "local", "global+local"]
LOSSES = re.compile(
    r"train_(?P<trained>[^/]+)/(train_loss|final_train_loss|penalty|num_tokens|num_answer_tokens)"
)
"""Figures of a training phase that follow from its records' texts; nothing needs them."""
MARGIN = re.compile(r"[^/]+/[^/]+/margin_per_byte")
"""By how much questions' right answers are likelier than wrong ones: losses of test records."""


class PolicyError(ConfidentialError):
    """A message asks for what this site does not permit.

    Args:
        refused: the rules that refuse it, each with the reason, which stays here.
    """

    def __init__(self, refused: Mapping[str, str]) -> None:
        names = ", ".join(refused)
        reasons = "\n".join(f"  {name}: {why}" for name, why in refused.items())
        super().__init__(f"The policy refuses:\n{reasons}", f"its policy refuses: {names}")
        self.refused = dict(refused)


class Policy(Section):
    """The rules; one that is left out permits everything."""

    coordinator: str | None = None
    """SHA-256 of the certificate in package/root.crt, with which the SuperNode knows its server."""
    experiments: list[str] | None = None
    """Names that an experiment may have."""
    participants: list[str] | None = None
    """Ids of clients that may take part, this one's among them."""
    least_others: int | None = Field(None, ge=1)
    """So many other clients' updates are in every average with this one's, at least."""
    rounds: int | None = Field(None, ge=1)
    """Rounds of an experiment, at most."""
    modes: list[Mode] | None = None
    schedules: list[Schedule] | None = None
    """``training.schedule``: in "mixed" and "joint" what is sent was trained on local records."""
    adapter_rank: int | None = Field(None, ge=1)
    """Of either adapter, at most."""
    target_modules: list[str] | None = None
    """Modules that adapters may be on, by the names in adapters.*.target_modules."""
    max_norm_ratio: float | None = Field(None, gt=0)
    """At most; so that this client looks at every global adapter that is sent to it."""
    send_update: bool = True
    """Whether an update of the global adapter may leave at all."""
    update_parameters: int | None = Field(None, ge=1)
    """Numbers in an update, at most."""
    update_dtypes: list[Dtype] | None = None
    privacy: PrivacyRule | None = None
    """Whom the updates protect, who adds the noise, and the epsilon that a run may spend."""
    metrics: list[str] | None = None
    """Patterns of the figures that may leave: "train_*", "*/exact_match"."""
    losses: list[Trained] | None = None
    """Phases, by what they train, whose losses and numbers of tokens may leave; those of others,
    and margins of answers, are left out of replies. A server that chooses the adapter with which
    they are measured, and over how many records, can read a record from them."""
    facts: list[str] | None = None
    """Patterns of the facts that may leave: "sha256/*", "device"."""
    code_sha256: str | None = None
    """Of this package's sources, as fedlora deploy doctor shows it."""
    base_sha256: str | None = None
    """Of the base model: weights, config.json, tokenizer, chat template."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps in a round, at most."""
    seconds: float | None = Field(None, gt=0)
    """Of work for one message, at most. A round has two: training, and what follows the average."""

    @field_validator("coordinator", "code_sha256", "base_sha256")
    @classmethod
    def _read_sha256(cls, value: str | None) -> str | None:
        if value is None:
            return None
        digits = "".join(value.replace(":", " ").split()).lower()
        if len(digits) != SHA256_LENGTH or set(digits) - set(HEX):
            raise ValueError("expected a SHA-256, 64 hex digits")
        return digits


@dataclass(frozen=True)
class Asked:
    """What a message asks of this client.

    Args:
        experiment: as it is carried out here.
        root_certificate: the file with which this site's SuperNode knows its server.
        fingerprint: computes that of the base model.
        count_examples: returns this client's universal and local examples.
    """

    client_id: str
    server_round: int
    experiment: Config
    root_certificate: Path
    fingerprint: Callable[[], str]
    count_examples: Callable[[], tuple[int, int]]

    @property
    def rounds_with_update(self) -> Iterator[int]:
        """The rounds in which this client sends an update."""
        config = self.experiment
        return (
            number
            for number in range(1, config.federated.num_rounds + 1)
            if plan_round(config, number).train is not None
            and self.client_id in training_clients(config, number)
        )


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfidentialError: with every fault, each under its dotted path.
    """
    told = "its policy cannot be read; its log says why"
    try:
        raw = read_yaml(path)
    except ConfigError as error:
        raise ConfidentialError(str(error), told) from None
    if not isinstance(raw, dict):
        raise ConfidentialError(f"{path} holds no rules. Expected keys such as rounds.", told)
    if empty := [str(name) for name, value in raw.items() if value is None]:
        raise ConfidentialError(
            f"{path}: nothing stands behind {', '.join(empty)}. A rule that is to permit "
            "everything is left out, name and all.",
            told,
        )
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        text = list_faults(str(path), *describe_faults(error, Policy))
        raise ConfidentialError(text, told) from None


def list_open_rules(path: Path) -> list[str]:
    """Return the rules that a policy leaves out, so that it permits everything in them.

    Raises:
        ConfidentialError: with every fault, each under its dotted path.
    """
    named = load_policy(path).model_fields_set
    return [name for name in Policy.model_fields if name not in named]


@dataclass(frozen=True)
class Guard:
    """Holds one message, and the reply to it, against a policy."""

    policy: Policy
    started: float = field(default_factory=lambda: time.monotonic())
    """When the message came, by the monotonic clock."""

    def require_permitted(self, asked: Asked) -> None:
        """Raise ``PolicyError`` where a message asks for more than is permitted."""
        found = {
            name: find(value, asked)
            for name, find in RULES.items()
            if (value := getattr(self.policy, name)) is not None
        }
        _refuse(found)

    def require_steps(self, count: Callable[[int], int], asked: Asked) -> None:
        """Raise likewise where this client's data make more steps than are permitted.

        Args:
            count: returns the steps of a round; only called where there is such a rule.
        """
        if self.policy.steps is None:
            return
        # Before the first round a client looks at both kinds: the last one may have more steps.
        last = asked.experiment.federated.num_rounds
        rounds = {asked.server_round} if asked.server_round else {1, last}
        most = max(map(count, rounds))
        if most > self.policy.steps:
            _refuse({"steps": f"a round has {most}, and at most {self.policy.steps} are permitted"})

    def require_time(self) -> None:
        """Raise ``PolicyError`` where this message takes longer than is permitted."""
        seconds = time.monotonic() - self.started
        if self.policy.seconds is not None and seconds > self.policy.seconds:
            why = f"{seconds:.0f} have passed, and {self.policy.seconds:g} are permitted"
            _refuse({"seconds": why})

    def withhold(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the figures of a reply without the losses and margins that are to stay here."""
        permitted = self.policy.losses
        if permitted is None:
            return dict(metrics)

        def stays(name: str) -> bool:
            loss = LOSSES.fullmatch(name)
            return (
                bool(MARGIN.fullmatch(name)) if loss is None else loss["trained"] not in permitted
            )

        return {name: value for name, value in metrics.items() if not stays(name)}

    def require_sendable(
        self,
        metrics: Iterable[str],
        facts: Iterable[str],
        update: AdapterState | None,
        dtype: str,
    ) -> None:
        """Raise ``PolicyError`` where a reply would hold more than may leave.

        Args:
            dtype: in which the update would travel.
        """
        self.require_time()
        policy = self.policy
        refused: dict[str, str | None] = {
            "metrics": _find_unlisted(policy.metrics, metrics),
            "facts": _find_unlisted(policy.facts, facts),
        }
        if update is not None:
            if not policy.send_update:
                refused["send_update"] = "the reply has an update"
            most, found = policy.update_parameters, sum(t.numel() for t in update.values())
            if most is not None and found > most:
                refused["update_parameters"] = f"the update has {found}, and {most} are permitted"
            if policy.update_dtypes is not None and dtype not in policy.update_dtypes:
                refused["update_dtypes"] = f"the update is in {dtype}"
        _refuse(refused)

    def require_spendable(self, compute: Callable[[float], float]) -> None:
        """Raise ``PolicyError`` where an update would spend more epsilon than is permitted.

        Args:
            compute: returns what is spent with it at a delta, rounds that were repeated included.
        """
        rule = self.policy.privacy
        if rule is not None:
            _refuse({"privacy": rule.find_excess(compute)})


def count_sure_others(config: Config, server_round: int) -> int:
    """Return how many other updates are in a round's average with each, whoever else fails."""
    trainers = training_clients(config, server_round)
    return min(config.federated.required_clients, len(trainers)) - 1


def fingerprint_certificate(path: Path) -> str:
    """Return the SHA-256 of a PEM certificate, as openssl x509 -fingerprint -sha256 has it.

    Raises:
        ValueError, OSError: there is none.
    """
    der = ssl.PEM_cert_to_DER_cert(path.read_text(encoding="ascii").strip())
    return hashlib.sha256(der).hexdigest()


def _refuse(found: Mapping[str, str | None]) -> None:
    if refused := {name: why for name, why in found.items() if why is not None}:
        raise PolicyError(refused)


def _find_unlisted(patterns: list[str] | None, names: Iterable[str]) -> str | None:
    if patterns is None:
        return None
    unlisted = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in patterns)]
    return f"no pattern has {', '.join(unlisted)}" if unlisted else None


def _find_other(found: str, permitted: list[str]) -> str | None:
    return None if found in permitted else f"{found} is none of {', '.join(permitted)}"


def _check_coordinator(permitted: str, asked: Asked) -> str | None:
    try:
        found = fingerprint_certificate(asked.root_certificate)
    except (OSError, ValueError) as error:
        return f"its root certificate cannot be read ({type(error).__name__})"
    return None if found == permitted else f"its root certificate is {found}, not {permitted}"


def _check_experiments(permitted: list[str], asked: Asked) -> str | None:
    return _find_other(asked.experiment.experiment.name, permitted)


def _check_participants(permitted: list[str], asked: Asked) -> str | None:
    others = sorted(set(asked.experiment.client_ids) - set(permitted))
    return f"{', '.join(others)} would take part" if others else None


def _check_least_others(permitted: int, asked: Asked) -> str | None:
    config = asked.experiment
    if config.federated.weighting == "given":
        weights = {c.id: c.weight or 0.0 for c in config.federated.clients}
        share = weights[asked.client_id] / sum(weights.values())
        if share > 1 / (permitted + 1):
            return f"by its weight this client would have {share:.0%} of every average"
    if config.federated.mode not in AVERAGING_MODES:
        return None if plan_round(config, 1).train is None else f"mode {config.federated.mode}"
    for number in asked.rounds_with_update:
        sure = count_sure_others(config, number)
        if sure < permitted:
            return f"in round {number} no more than {sure} others are sure to send an update"
    return None


def _check_rounds(permitted: int, asked: Asked) -> str | None:
    most = max(asked.experiment.federated.num_rounds, asked.server_round)
    return None if most <= permitted else f"{most}, and at most {permitted} are permitted"


def _check_schedules(permitted: list[str], asked: Asked) -> str | None:
    return _find_other(asked.experiment.training.schedule, permitted)


def _check_modes(permitted: list[str], asked: Asked) -> str | None:
    return _find_other(asked.experiment.federated.mode, permitted)


def _check_adapter_rank(permitted: int, asked: Asked) -> str | None:
    ours = asked.experiment.adapters_of(asked.client_id)
    most = max(ours.global_.joint.rank, ours.local.joint.rank)
    return None if most <= permitted else f"{most}, and at most {permitted} is permitted"


def _check_target_modules(permitted: list[str], asked: Asked) -> str | None:
    adapters = asked.experiment.adapters
    named: set[str] = set()
    for adapter in (adapters.global_, adapters.local):
        modules = adapter.target_modules
        named |= {modules} if isinstance(modules, str) else set(modules)
    others = sorted(named - set(permitted))
    return f"adapters would be on {', '.join(others)}" if others else None


def _check_max_norm_ratio(permitted: float, asked: Asked) -> str | None:
    ratio = asked.experiment.federated.max_norm_ratio
    if ratio is None:
        return "the experiment sets none, so that no global adapter would be looked at here"
    return None if ratio <= permitted else f"{ratio:g}, and at most {permitted:g} is permitted"


def _check_send_update(permitted: bool, asked: Asked) -> str | None:
    if permitted or next(asked.rounds_with_update, None) is None:
        return None
    return f"mode {asked.experiment.federated.mode} has this client send updates"


def _check_update_dtypes(permitted: list[str], asked: Asked) -> str | None:
    return _find_other(asked.experiment.federated.upload_dtype, permitted)


def _check_privacy(permitted: PrivacyRule, asked: Asked) -> str | None:
    return find_privacy_fault(permitted, asked.experiment, asked.client_id, asked.count_examples)


def _check_code(permitted: str, asked: Asked) -> str | None:
    found = hash_package()
    return None if found == permitted else f"this process runs {found}, not {permitted}"


def _check_base(permitted: str, asked: Asked) -> str | None:
    found = asked.fingerprint()
    return None if found == permitted else f"the base model here is {found}, not {permitted}"


RULES: dict[str, Callable[[Any, Asked], str | None]] = {
    "coordinator": _check_coordinator,
    "experiments": _check_experiments,
    "participants": _check_participants,
    "least_others": _check_least_others,
    "rounds": _check_rounds,
    "modes": _check_modes,
    "schedules": _check_schedules,
    "adapter_rank": _check_adapter_rank,
    "target_modules": _check_target_modules,
    "max_norm_ratio": _check_max_norm_ratio,
    "send_update": _check_send_update,
    "update_dtypes": _check_update_dtypes,
    "privacy": _check_privacy,
    "code_sha256": _check_code,
    "base_sha256": _check_base,
}
"""What is held against a message before anything is done; each returns why it is refused."""
