"""What averaging A and B apart costs, against averaging what they do.

A client's adapter adds B_k A_k to a layer. The mean of those products is not the product of the
means; what is missing is E = sum_k p_k B_k A_k - B_mean A_mean, with p_k = n_k / sum_k n_k. The
part that all clients started from cancels, so with the updates b_k and a_k

    E = sum_k p_k b_k a_k - b_mean a_mean,

which is 0 for one client, and for clients that agree. No dense product is formed, and no
client's update is kept: with a fixed Gaussian matrix W (in, s) every client adds its
b_k (a_k W) to the sum that its update goes to, and the expectation of ||E W||^2 / s is
||E||^2 (Halko, Martinsson & Tropp 2011, https://arxiv.org/abs/0909.4061; all norms are
Frobenius). Where a layer puts out more than it takes in, its transpose is treated so.
"""

from __future__ import annotations

import torch

from fedlora_app.federation.product_errors import ProductErrors
from fedlora_app.federation.rules.fedavg import FedAvg
from fedlora_app.federation.weighted_mean import RejectedUpdateError, WeightedMean
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapter_state import AdapterState

NUM_COLUMNS = 8
"""Of W. The squared norm of a matrix of rank one then has a standard error of
sqrt(2 / 8) = 50 %, the norm of 25 %; that of r equal singular values 25 % / sqrt(r), and that of
all m modules together about 25 % / sqrt(r m): 2 % and less in a model of 196 modules."""
ROUNDING = 1e-13  # of sums over up to 20,000 products in double precision


class ProductSketch:
    """The products B A of an adapter's modules, each seen through a random matrix.

    Args:
        shapes: of the adapter's tensors, in pairs of lora_A (rank, in) and lora_B (out, rank).
        seed: decides the random matrices, one per size of a layer.
    """

    def __init__(
        self, shapes: dict[str, torch.Size], seed: int, num_columns: int = NUM_COLUMNS
    ) -> None:
        self._seed = seed
        self._num_columns = num_columns
        self._pairs = {_module_name(a): (a, _partner(a)) for a in shapes if ".lora_A." in a}
        self._shapes = shapes
        self._matrices: dict[int, torch.Tensor] = {}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors that ``project`` returns."""
        sizes = {}
        for module, (a, b) in self._pairs.items():
            smaller = min(self._shapes[a][1], self._shapes[b][0])
            sizes[_sum_name(module)] = torch.Size([smaller, self._num_columns])
        return sizes

    def project(self, update: AdapterState) -> dict[str, torch.Tensor]:
        """Return b (a W) of every module, fp64, for the sum over the clients."""
        return {
            _sum_name(module): self._project(*self._factors(module, update))
            for module in self._pairs
        }

    def measure(
        self, mean: WeightedMean, products: WeightedMean, state: AdapterState
    ) -> ProductErrors:
        """Return ||E|| and ||B_mean A_mean||, both sketched.

        What rounding alone may have left counts as 0.

        Args:
            mean: of the clients' updates.
            products: of their projections.
            state: the adapter that came of it.
        """
        found = ProductErrors()
        for module, keys in self._pairs.items():
            means = {key: mean.mean_of(key) for key in keys}
            error = self._measure_error(module, products, means)
            found.note(module, error, self._project(*self._factors(module, state)).norm().item())
        return found

    def _measure_error(self, module: str, products: WeightedMean, means: AdapterState) -> float:
        """Return ||E W||, which is sqrt(s) times an estimate of ||E||."""
        outer, inner = self._factors(module, means)
        matrix = self._matrix(inner.shape[1])
        error = products.mean_of(_sum_name(module)) - outer @ (inner @ matrix)
        # What the resolution of the three means, and of their products, may amount to.
        seen = inner.abs() @ matrix.abs()
        blur = seen.sum(0) + outer.abs().sum(1, keepdim=True) * matrix.abs().sum(0) + 1
        noise = products.resolution * blur + ROUNDING * (outer.abs() @ seen)
        return error.norm().item() if error.norm() > noise.norm() else 0.0

    def _factors(self, module: str, state: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the product's factors (small, rank) and (rank, large), fp64."""
        a, b = (state[key].double() for key in self._pairs[module])
        return (b, a) if a.shape[1] >= b.shape[0] else (a.T, b.T)

    def _project(self, outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        return outer @ (inner @ self._matrix(inner.shape[1]))

    def _matrix(self, size: int) -> torch.Tensor:
        if size not in self._matrices:
            seed = derive_seed(self._seed, "aggregation error", size)
            generator = torch.Generator().manual_seed(seed)
            shape = (size, self._num_columns)
            self._matrices[size] = torch.randn(shape, dtype=torch.float64, generator=generator)
        return self._matrices[size]


class AggregationErrorObserver:
    """Watches one round beside a rule that averages A and B, and measures what that costs.

    It rejects no update: where projections cannot be summed, the round has no figure.
    """

    def __init__(self, sketch: ProductSketch) -> None:
        self._sketch = sketch
        self._products = WeightedMean(sketch.shapes)
        self._is_complete = True

    def add(self, update: AdapterState, num_examples: int) -> None:
        """See an update that the rule has folded in."""
        try:
            self._products.add(self._sketch.project(update), num_examples)
        except RejectedUpdateError:
            self._is_complete = False

    def measure(self, rule: FedAvg, state: AdapterState) -> ProductErrors:
        """Return what ``ProductSketch.measure`` does for the rule's new ``state``."""
        if not self._is_complete:
            return ProductErrors()
        return self._sketch.measure(rule.mean, self._products, state)


def _module_name(key: str) -> str:
    return key.removeprefix("base_model.model.").split(".lora_A.")[0]


def _partner(key: str) -> str:
    return key.replace(".lora_A.", ".lora_B.")


def _sum_name(module: str) -> str:
    return f"{module}.product"
