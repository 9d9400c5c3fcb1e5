"""What a client does, without Flower: register, train, personalise and evaluate.

Both adapters are set from scratch at the beginning of every call, the global one from
what the server sent and the local one from this client's folder, so nothing of one client
can reach the next through the process they share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fedlora_app.client_checks import check_client, list_owners
from fedlora_app.config.participation import find_span
from fedlora_app.config.privacy import protects_at
from fedlora_app.config.rounds import BOTH, Phase, plan_round
from fedlora_app.config.schema import (
    FEEDBACK,
    GLOBAL,
    LOCAL,
    OWN_GLOBAL,
    ClientConfig,
    Config,
    TrainingConfig,
)
from fedlora_app.config.sharing import PERSONAL, STAY, of_factors, travelling_factors
from fedlora_app.data.client_files import (
    ClientExamples,
    ClientFiles,
    count_unscored_conflicts,
    load_client_files,
    tokenize_client_files,
)
from fedlora_app.data.dialogue import pin_date
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.client_round import ClientEvaluation, Metrics, phase_metrics
from fedlora_app.evaluation.gold import count_gold_answers
from fedlora_app.federation.accountant import noise_multiplier_for
from fedlora_app.federation.messages import CONTROL, MAX_FINDINGS, Kept
from fedlora_app.federation.privacy import protect_update
from fedlora_app.foundation.progress import step_lines
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model import base as model_module
from fedlora_app.model.adapter_state import AdapterState, compute_norm
from fedlora_app.model.adapters import (
    AdaptedModel,
    attach_once,
    build_initial_state,
    get_state,
    learning_part,
    scaled_adapters,
    set_state,
    state_shapes,
)
from fedlora_app.model.base import (
    LoadedModel,
    describe_device,
    load_base_model,
    load_tokenizer,
)
from fedlora_app.model.ranks import resize_ranks
from fedlora_app.runs.client_folder import ClientFolder
from fedlora_app.runs.paths import RunPaths
from fedlora_app.training.decay import choose_decays
from fedlora_app.training.phase import PhaseResult, train_phase
from fedlora_app.training.record_privacy import bind_to_base, hides_records, protect_records
from fedlora_app.training.selection import Selection, select_phase, take_part
from fedlora_app.training.within_memory import settle_checkpointing, train_within_memory

FromKept = Mapping[str, Kept]
"""What a client continues from, by role; it begins anew with what is not in it."""


@dataclass(frozen=True)
class Client:
    """One client for the length of one message.

    Args:
        run_dir: the run directory on this machine; local adapters live in its clients/<id>.
        root: the project on this machine, to which data paths are relative.
        date: the day that chat templates write (YYYY-MM-DD), whichever it is; "": today.
        hide: makes a file's name fit to leave this machine.
        watch: called after every optimizer step; raises where this client is to stop.
    """

    config: Config
    client_id: str
    run_dir: Path
    root: Path
    date: str = ""
    hide: Callable[[str], str] = str
    watch: Callable[[], None] = lambda: None

    def register(self, *, resumes: bool = False) -> tuple[Metrics, dict[str, str]]:
        """Check and tokenise this client's data before anything large is loaded.

        Args:
            resumes: the run is continued, so this client's folder in it may be there.

        Returns:
            Counts of examples, and facts: the device and the data files' hashes.
        """
        files, tokenizer, findings = check_client(
            self.config, self.client_id, self.run_dir, self.root, self.date, resumes=resumes
        )
        examples = tokenize_client_files(self.config, self._own, files, tokenizer, self.root)
        counts = {
            "skipped_records": sum(file.num_skipped for file in files.all.values()),
            "unscored_conflicts": count_unscored_conflicts(self._own, files),
        }
        counts |= count_gold_answers(self.config, self._own, files, tokenizer)
        for name, tokenized in (("universal", examples.universal), ("local", examples.local)):
            counts[f"{name}_examples"] = len(tokenized.examples)
            counts[f"{name}_truncated"] = tokenized.num_truncated
            counts[f"{name}_dropped"] = tokenized.num_dropped
        if (public := examples.public) and (public.num_truncated or public.num_dropped):
            print(
                f"{self.client_id}: {public.num_truncated} public examples were cut and "
                f"{public.num_dropped} dropped as too long.",
                flush=True,
            )
        # The texts of findings quote the data; they are printed here and stay here.
        named = [
            {**vars(f), "file": CONTROL.sub(" ", self.hide(f.file))}
            for f in findings[:MAX_FINDINGS]
        ]
        for finding in named:
            del finding["text"]
        about = {"device": describe_device(), "findings": json.dumps(named)}
        return counts, files.hashes | about

    def verify(self, kept: FromKept) -> dict[str, str]:
        """Check that this client still holds what the run is to resume with.

        Returns:
            The base model's fingerprint, as a fact.

        Raises:
            AdapterError: a file is missing, or is not what the run wrote.
        """
        self.folder.remove_partials()
        requirements = {
            LOCAL: self.folder.require_local,
            OWN_GLOBAL: self.folder.require_own_global,
            FEEDBACK: self.folder.feedback.require,
        }
        for role, entry in kept.items():
            if entry.round >= 0:
                requirements[role](entry.round, entry.sha256)
        return {"base_model": model_module.compute_fingerprint(self.config.model, self.root)}

    def keep_final(self, kept: FromKept) -> None:
        """Keep adapters of a round as those to use.

        Raises:
            AdapterError: one is missing, or is not what the run wrote.
        """
        for role in (LOCAL, OWN_GLOBAL):
            if (entry := kept.get(role)) is not None:
                self.folder.copy_final(role, entry.round, entry.sha256)

    def global_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes that a global adapter must have here."""
        return state_shapes(self._load_model()[1], GLOBAL)

    def learning_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of what this client can train of the global adapter."""
        rank = self.config.adapters_of(self.client_id).global_.rank
        return resize_ranks(self.global_shapes(), rank)

    def update_shapes(self, server_round: int) -> dict[str, torch.Size]:
        """Return the shapes of the update that this client sends in a round."""
        return of_factors(self.learning_shapes(), travelling_factors(self.config, server_round))

    def accept_global(self, state: AdapterState, averaged: int) -> AdapterState:
        """Return a global adapter that was sent; raise where it is refused here.

        Args:
            averaged: the last round whose average is in it.

        Raises:
            MessageError: with federated.max_norm_ratio, it is not plausible.
        """
        if self.config.federated.max_norm_ratio is not None:
            self.folder.accept_global(self._load_model()[1], state, averaged, self.config)
        return state

    def keep_global(self, state: AdapterState) -> str:
        """Keep the global adapter for a later message; return its file's sha256."""
        return self.folder.save_global(self._load_model()[1], state)

    def kept_global(self, sha256: str) -> AdapterState:
        """Return the global adapter that this client kept when it last personalised.

        Raises:
            LostGlobalError: it is missing, damaged or another one.
        """
        return self.folder.load_global(self._load_model()[1], sha256)

    def train(
        self, server_round: int, global_state: AdapterState, kept: FromKept
    ) -> tuple[AdapterState, Metrics, dict[str, str]]:
        """Run the phase before the average.

        Args:
            global_state: the adapter that the server sent.

        Returns:
            The update (new minus received, fp32) of what travels of the global adapter, clipped
            and with noise where the client is to protect it; the metrics, of which
            ``num-examples`` counts this phase's examples only; and as facts the hashes of the data,
            and of the adapters that were kept.
        """
        phase = plan_round(self.config, server_round).train
        assert phase is not None, "this mode has nothing to train before the average"
        self.folder.remove_before()
        loaded, model = self._prepare(global_state, kept)
        start = get_state(model, GLOBAL)
        result = self._run_phase(loaded, model, phase, server_round)
        facts = self._files[self.client_id].hashes | {"base_model": loaded.fingerprint}
        if LOCAL in phase.trainable:
            facts["local_adapter"] = self.folder.save_local(model, server_round)
        trained = get_state(model, GLOBAL)
        if self.config.federated.rule in STAY:
            own = self.folder.save_own_global(model, trained, server_round, is_final=False)
            facts["own_global_adapter"] = own
        sent = of_factors(
            learning_part(model, trained), travelling_factors(self.config, server_round)
        )
        before = learning_part(model, start)
        update = {key: sent[key] - before[key] for key in sent}
        if protects_at(self.config.privacy, "client"):
            update = protect_update(
                update, self.config, server_round, self.folder.read_or_make_secret_key
            )
        metrics = phase_metrics(phase, result) | {"update_norm": compute_norm(update)}
        return update, {"num-examples": result.num_examples, **metrics}, facts

    def personalise(
        self,
        server_round: int,
        global_state: AdapterState,
        kept: FromKept,
    ) -> tuple[Metrics, dict[str, str]]:
        """Fit the local adapter to the new global one, keep it, and evaluate.

        Round 0 makes the initial local adapter and evaluates the base model alone.

        The global adapter is kept for the next message, unless this is the last round.

        Returns:
            The metrics, of which ``peak_memory_bytes`` is the evaluation's, and facts: hashes of
            the data, of the base model and of the adapters that were kept, the process.
        """
        plan = plan_round(self.config, server_round)
        loaded, model = self._prepare(global_state, kept)
        self.folder.keep_before(server_round, {role: of.sha256 for role, of in kept.items()})
        is_final = server_round == self.config.federated.num_rounds
        self.folder.remove_final()
        metrics: Metrics = {}
        facts = self._files[self.client_id].hashes | {
            "base_model": loaded.fingerprint,
            "process": f"{os.getpid()}, base model loaded {model_module.num_loads} times",
        }
        if server_round > 0 and plan.personalise is not None:
            if plan.personalise.starts_from_global:
                set_state(model, LOCAL, get_state(model, GLOBAL))
            result = self._run_phase(loaded, model, plan.personalise, server_round)
            metrics |= phase_metrics(plan.personalise, result)
        if LOCAL in plan.evaluated:
            facts["local_adapter"] = self.folder.save_local(model, server_round)
        if self.config.federated.rule in PERSONAL:
            facts["own_global_adapter"] = self.folder.save_own_global(
                model, get_state(model, GLOBAL), server_round, is_final=is_final
            )
        metrics |= self._evaluation(loaded, model).evaluate_round(plan, server_round)
        if is_final:
            self.folder.remove_global()
            if LOCAL in plan.evaluated:
                self.folder.save_final(model)
        else:
            facts["global_adapter"] = self.folder.save_global(model, global_state)
        # Whatever the server says, what this round has made stays.
        self.folder.thin({role: min(of.oldest, server_round) for role, of in kept.items()})
        return metrics, facts

    def evaluate(self, global_state: AdapterState, kept: FromKept) -> Metrics:
        """Score the question sets with a round's adapters, without training."""
        evaluation = self._evaluation(*self._prepare(global_state, kept))
        active = plan_round(self.config, self.config.federated.num_rounds).evaluated
        who = Answering.own(active, self.client_id)
        return evaluation.evaluate(who, evaluation.find_gate(who))

    @property
    def folder(self) -> ClientFolder:
        """What this client keeps of the run."""
        return ClientFolder(RunPaths(self.run_dir), self.client_id, self.config.model.name)

    @property
    def _own(self) -> ClientConfig:
        return self.config.client(self.client_id)

    @cached_property
    def _files(self) -> dict[str, ClientFiles]:
        """The data that this client works with, read once: the hashes are of what was used."""
        return {
            owner: load_client_files(self.config, self.config.client(owner), self.root)
            for owner in list_owners(self.config, self.client_id)
        }

    def _prepare(
        self, global_state: AdapterState, kept: FromKept
    ) -> tuple[LoadedModel, AdaptedModel]:
        """Set both adapters from scratch.

        What this client has kept of the global one for itself takes the received one's place.
        """
        loaded, model = self._load_model()
        own_global, local = (kept.get(role, Kept()) for role in (OWN_GLOBAL, LOCAL))
        if own_global.round >= 0 and (factors := STAY.get(self.config.federated.rule)):
            own = self.folder.load_own_global(model, own_global.round, own_global.sha256)
            global_state = global_state | of_factors(own, factors)
        if local.round < 0:
            seed = derive_seed(self.config.experiment.seed, "initial", self.client_id)
            local_state = build_initial_state(model, LOCAL, seed)
        else:
            local_state = self.folder.load_local(model, local.round, local.sha256)
        set_state(model, GLOBAL, global_state)
        set_state(model, LOCAL, local_state)
        return loaded, model

    def _load_model(self) -> tuple[LoadedModel, AdaptedModel]:
        loaded = load_base_model(self.config.model, self.root)
        pin_date(loaded.tokenizer, self.date)
        return loaded, attach_once(loaded, self.config.adapters_of(self.client_id))

    def _evaluation(self, loaded: LoadedModel, model: AdaptedModel) -> ClientEvaluation:
        files = self._files[self.client_id]
        return ClientEvaluation(self.config, self._own, files, loaded, model, self.folder.gate)

    def count_steps(self, server_round: int) -> int:
        """Return the optimizer steps that this client's data make in a round, before any of them.

        Raises:
            DataError, ModelError: the data or the tokenizer cannot be read.
        """
        tokenizer = self._load_tokenizer()
        plan = plan_round(self.config, server_round)
        phases = [phase for phase in (plan.train, plan.personalise) if phase is not None]
        return sum(self._select(tokenizer, phase, server_round).num_steps for phase in phases)

    def count_examples(self) -> tuple[int, int]:
        """Return how many universal and local examples this client's data make.

        Raises:
            DataError, ModelError: likewise.
        """
        files = self._files[self.client_id]
        examples = tokenize_client_files(
            self.config, self._own, files, self._load_tokenizer(), self.root
        )
        return len(examples.universal.examples), len(examples.local.examples)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.config.model, self.root)
        pin_date(tokenizer, self.date)
        return tokenizer

    def _select(
        self, tokenizer: PreTrainedTokenizerBase, phase: Phase, server_round: int
    ) -> Selection:
        def load(owner: str) -> ClientExamples:
            client, files = self.config.client(owner), self._files[owner]
            return tokenize_client_files(self.config, client, files, tokenizer, self.root)

        return select_phase(self.config, self.client_id, phase, server_round, load)

    def _run_phase(
        self, loaded: LoadedModel, model: AdaptedModel, phase: Phase, server_round: int
    ) -> PhaseResult:
        selected = self._select(loaded.tokenizer, phase, server_round)
        examples, given = selected.examples, self.config.privacy
        privacy = None
        if hides_records(phase, given):
            counts = (selected.num_universal, selected.num_local)
            noise = noise_multiplier_for(self.config, self.client_id, counts)
            key = bind_to_base(self.folder.read_or_make_secret_key(), loaded.fingerprint)
            privacy = protect_records(phase, given, noise, key)
        if privacy is None:  # else every step draws of all of them
            examples = take_part(selected, self.config, self.client_id, phase, server_round)
        kind = (self.run_dir, phase.name)
        training = loaded.smaller_batches.get(kind) or settle_checkpointing(
            self.config, model, phase, selected.examples
        )
        first, last = 1, self.config.federated.num_rounds
        if GLOBAL not in phase.trainable:  # what is the client's alone begins and ends with it
            first, last = find_span(self.config, self.client_id)
        num_rounds = last - first + 1
        what = f"{self.client_id}, round {server_round}, {phase.name}"
        show = step_lines(what)

        def note_step(step: int, num_steps: int, loss: float) -> None:
            show(step, num_steps, loss)
            self.watch()

        def train(settings: TrainingConfig) -> PhaseResult:
            return train_phase(
                model,
                examples,
                settings,
                active=phase.active,
                trainable=phase.trainable,
                num_steps=selected.num_steps,
                run_span=(
                    max(0, server_round - phase.num_rounds - first + 1) / num_rounds,
                    (server_round - first + 1) / num_rounds,
                ),
                weight_decays=choose_decays(self.config, phase, selected.num_steps, num_rounds),
                seed=derive_seed(
                    self.config.experiment.seed, phase.name, server_round, self.client_id
                ),
                progress=note_step,
                factors=phase.factors,
                privacy=privacy,
            )

        with scaled_adapters(model, dict(zip(BOTH, phase.weights, strict=True))):
            result, fitted = train_within_memory(model, phase, training, train, what)
        if fitted is not training:
            loaded.smaller_batches[kind] = fitted
        return result
