"""What ``fedlora deploy doctor`` looks at in a client's own file and policy, and what they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.deployment.client_file import ConfidentialError, OwnSettings, load_own_settings
from fedlora_app.deployment.facts import Facts
from fedlora_app.deployment.finding import Finding, fault, ok, warning
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.deployment.package import CLIENT, POLICY, describe_base
from fedlora_app.deployment.policy import load_policy
from fedlora_app.model.pretrained import names_folder
from fedlora_app.planning.plan import build_plan
from fedlora_app.planning.text import format_size
from fedlora_app.planning.workload import missing_files, missing_questions


def examine_own_files(site: SiteFolder, facts: Facts) -> Iterator[Finding]:
    """Look at the client's own file, at the policy, and at the experiment with both."""
    try:
        own = load_own_settings(site.client_file)
    except ConfigError as error:
        yield fault(site.client_file.name, str(error), f"Its draft is {site.package / CLIENT}.")
        if site.policy.exists():
            yield _examine_policy(site.policy)
        return
    yield (
        _examine_policy(own.policy_path)
        if own.policy_path
        else warning(
            "policy",
            "there is none, so all is permitted.",
            f"Its draft is {site.package / POLICY}.",
        )
    )
    if own.client_id != facts.client:
        what = f'id is "{own.client_id}", and the package is for {facts.client}.'
        yield fault(site.client_file.name, what, "The run refuses a site by another's id.")
        return
    config = build_local_config(own, facts)
    yield ok(site.client_file.name, f"it goes together with the experiment, as {own.client_id}.")
    yield _examine_data(own, config)
    yield from _examine_base(own, config, facts)


def _examine_policy(path: Path) -> Finding:
    try:
        rules = load_policy(path).model_dump(exclude_none=True)
    except ConfidentialError as error:
        return fault("policy", str(error), "Until then nothing at all is permitted.")
    return ok("policy", f"{path} has {len(rules)} rules.")


def _examine_data(own: OwnSettings, config: Config) -> Finding:
    missing = missing_files(config, own.folder) + missing_questions(config, own.folder)
    if missing:
        what = f"{', '.join(missing)} of {own.path.name} cannot be found in {own.folder}."
        return fault("data", what, "docs/data.md says what they hold.")
    return ok("data", "every file that is named is there.")


def _examine_base(own: OwnSettings, config: Config, facts: Facts) -> Iterator[Finding]:
    """Look at the base model, and whether the experiment fits this machine with it."""
    base = describe_base(config, own.folder)
    if base.fingerprint is None:
        advice = f"Name its folder in {own.path} (model.name)"
        if not names_folder(config.model, own.folder):
            advice += f", or hf download {config.model.name}"
        yield fault("base", f"{config.model.name} is not on this machine.", f"{advice}.")
        return
    if facts.base.fingerprint is None:
        advice = "The other sites must have the same: ask the coordinator for its fingerprint."
        yield warning("base", f"{base.fingerprint[:12]}; the package names none.", advice)
    elif base.fingerprint == facts.base.fingerprint:
        yield ok("base", f"{config.model.name} is the experiment's ({base.fingerprint[:12]}).")
    else:
        what = f"{config.model.name} is {base.fingerprint[:12]}, and the experiment's is "
        what += f"{facts.base.fingerprint[:12]}."
        yield fault("base", what, f"Get {facts.base.name} in the revision {facts.base.revision}.")
    verdict = build_plan(_without_others(config, own.client_id), own.folder).verdict
    what = f"training takes {format_size(verdict.peak_bytes)} of {format_size(verdict.limit_bytes)}"
    what += f", {verdict.limit_source}."
    if verdict.fits:
        yield ok("memory", what)
    else:
        settings = ", ".join(f"{k}: {v}" for k, v in (verdict.changes or {}).items())
        advice = f"It would fit with {settings}." if settings else "Use a machine with more."
        yield warning("memory", what, advice)


def _without_others(config: Config, client_id: str) -> Config:
    """Return the experiment of one client, which is all that a plan can be made for here."""
    raw = config.dump()
    raw["federated"]["clients"] = [c for c in raw["federated"]["clients"] if c["id"] == client_id]
    raw["data"] |= {"conflict_test": None, "conflict_validation": None}  # they name the others
    return parse_config(raw)


def build_local_config(own: OwnSettings, facts: Facts) -> Config:
    """Return the experiment as far as the package and this client's own file know it.

    Raises:
        ConfigError, ConfidentialError: the two do not go together.
    """
    named = {
        "experiment": {"name": facts.experiment},
        "federated": {"clients": [{"id": i} for i in sorted({*facts.participants, facts.client})]},
        "data": {"universal_train": None},
    }
    return own.merge(parse_config(facts.settings | named, source="package.json"))
