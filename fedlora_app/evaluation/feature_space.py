"""A space in which what one and the same fact is asked with counts less than what it is.

Within-class covariance normalisation: Hatch et al. 2006,
https://doi.org/10.21437/Interspeech.2006-183.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.seeds import derive_seed

MAX_DEVIATIONS = 1024  # that the covariance of wordings is estimated from
SHRINKAGE = 0.3  # of that covariance towards its mean variance (Ledoit and Wolf 2004)


@dataclass(frozen=True)
class Space:
    """A feature space in which wordings count less: x -> x + V (g * V^T x), x centred.

    ``centre`` (D,), ``basis`` V (D, R) orthonormal, ``gains`` g (R,) in (-1, 0]. Up to a factor
    this is the inverse root of (1 - s) C + s mean(diag C) I, C the covariance within groups.
    """

    centre: torch.Tensor
    basis: torch.Tensor
    gains: torch.Tensor

    @classmethod
    def fit(cls, groups: Sequence[torch.Tensor]) -> Space:
        """Return the space in which members of one group, (N, D) each, differ least."""
        centre = torch.stack([group.mean(0) for group in groups]).mean(0)
        several = [group for group in groups if len(group) > 1]
        if not several:
            size = len(centre)
            return cls(centre.float(), torch.zeros(size, 0), torch.zeros(0))
        scale = [(len(group) / (len(group) - 1)) ** 0.5 for group in several]
        deviations = torch.cat(
            [(group - group.mean(0)) * s for group, s in zip(several, scale, strict=True)]
        )
        if len(deviations) > MAX_DEVIATIONS:
            rng = random.Random(derive_seed("gate", "deviations"))
            deviations = deviations[sorted(rng.sample(range(len(deviations)), MAX_DEVIATIONS))]
        # By the smaller Gram matrix: Z = U S V^T, C = Z^T Z / N.
        values, vectors = torch.linalg.eigh(deviations @ deviations.T)
        is_kept = values > values.max() * 1e-10
        basis = deviations.T @ vectors[:, is_kept] / values[is_kept].sqrt()
        variances = values[is_kept] / len(deviations)
        floor = SHRINKAGE * (variances.sum() / len(centre)).clamp_min(1e-12)
        gains = (floor / (floor + (1 - SHRINKAGE) * variances)).sqrt() - 1
        return cls(centre.float(), basis.float(), gains.float())

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return unit vectors (N, D) whose inner products are similarities.

        Raises:
            UserError: the features have another size.
        """
        if features.shape[1] != len(self.centre):
            raise UserError(
                f"The client's gate compares features of {len(self.centre)} numbers, and the base "
                f"model makes {features.shape[1]}. The gate's files are damaged: restore them, or "
                "delete its folder to have it fitted again."
            )
        basis = self.basis.double()
        centred = features - self.centre
        spread = centred + ((centred @ basis) * self.gains) @ basis.T
        return torch.nn.functional.normalize(spread, dim=-1)
