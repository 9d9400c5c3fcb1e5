"""A client that has a local adapter already, and fits its scale (lambda) to another global adapter.

Input: the client's local adapter of an earlier run. The scale is chosen among
``evaluation.local_scales`` on the client's validation questions, by the score that chooses a final
round too; the nearest to 1 of several such. Output: the adapter with its B multiplied by it, so
that it answers at scale 1 in every command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedlora_app.client import Client
from fedlora_app.config.rounds import BOTH, Phase
from fedlora_app.config.schema import LOCAL, Config
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.final_round import score_client
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.adapters import AdaptedModel, scaled_local, set_state
from fedlora_app.model.base import LoadedModel
from fedlora_app.runs.reading import SavedRun

LORA_B = ".lora_B."
PAIRED = ("dual", "adapted", "local-only")
"""Modes whose local adapters hold nothing but what is the client's own."""


@dataclass(frozen=True)
class ScaleResult:
    """What was done in the place of a training phase."""

    scale: float
    score: float
    """On the validation questions at that scale, 0 to 1."""
    score_unscaled: float
    num_steps: int = 0


@dataclass(frozen=True)
class RescalingClient(Client):
    """A client whose rounds fit the scale of a local adapter, and train nothing."""

    earlier: SavedRun = field(kw_only=True)
    """The run that it has the adapter of."""

    def _run_phase(
        self, loaded: LoadedModel, model: AdaptedModel, phase: Phase, server_round: int
    ) -> Any:
        kept = SavedModel(self.earlier, self.earlier.final_round, self.root)
        state = kept.read_state(self.client_id, model)
        set_state(model, LOCAL, state)
        scores = dict.fromkeys([1.0, *self.config.evaluation.local_scales], 0.0)
        evaluation = self._evaluation(loaded, model)
        own = Answering.own(BOTH, self.client_id)
        gate = evaluation.find_gate(own)
        for scale in scores:
            with scaled_local(model, scale):
                score = score_client(evaluation.validate(own, gate))
            if score is None:
                raise UserError(f"{self.client_id}: none of its validation questions is its own.")
            scores[scale] = score
            print(
                f"{self.client_id}: scale {scale:g}, {scores[scale]:.3f} on the validation "
                "questions",
                flush=True,
            )
        best = max(scores, key=lambda scale: (scores[scale], -abs(scale - 1)))
        scaled = {key: best * t if LORA_B in key else t for key, t in state.items()}
        set_state(model, LOCAL, scaled)
        return ScaleResult(best, scores[best], scores[1.0])


def require_local(
    earlier: SavedRun, client_id: str, config: Config, model: AdaptedModel, run: SavedRun
) -> None:
    """Check that a client's local adapter of a run is there and fits.

    Args:
        model: may have no weights.
        run: that of the global adapter, which must have the same base model.

    Raises:
        UserError: there is none, or it is not what ``config`` says of local adapters.
    """
    theirs = earlier.config
    if theirs.federated.mode not in PAIRED:
        raise UserError(
            f"{earlier.path} is of mode {theirs.federated.mode}, whose local adapters are none "
            "beside a global one. Name a run of mode dual, adapted or local-only."
        )
    if client_id not in theirs.client_ids:
        raise UserError(
            f"{earlier.path} has no client {client_id}. It has: {', '.join(theirs.client_ids)}."
        )
    bases = [found.manifest["base_model"].get("fingerprint") for found in (earlier, run)]
    if None in bases or len(set(bases)) > 1:
        raise UserError(
            f"the base model of {earlier.name} is not that of {run.name}, or a manifest holds no "
            "fingerprint of it. A local adapter fits the base model that it was trained on alone."
        )
    if theirs.adapters.local != config.adapters.local:
        raise UserError(
            f"adapters.local: it is {theirs.adapters.local} in {earlier.name}, and "
            f"{config.adapters.local} here. Set it to that of the adapter."
        )
    data, own = config.data, config.client(client_id).local_validation
    if not (data.universal_validation or data.conflict_validation or own):
        raise UserError(
            "there are no validation questions to choose the scale on. Name a file in "
            "data.universal_validation, data.conflict_validation or its local_validation."
        )
    kept = SavedModel(earlier, earlier.final_round, earlier.path)
    kept.read_state(client_id, model)
