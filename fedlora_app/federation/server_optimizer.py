"""What the server does with a round's mean update beyond adding it: momentum, Adam, Yogi, Adagrad.

With the mean update d_t, after Reddi et al. 2021 (https://arxiv.org/abs/2003.00295, algorithm 2):
m_t = beta_1 m + (1 - beta_1) d_t and x + eta m_t / (sqrt(v_t) + tau), where v_t is v + d_t^2
(adagrad), v - (1 - beta_2) d_t^2 sign(v - d_t^2) (yogi) or beta_2 v + (1 - beta_2) d_t^2 (adam).
momentum (Hsu et al. 2019, https://arxiv.org/abs/1909.06335): v = beta_1 v + d_t and x + eta v.

The arithmetic is that of Flower's FedAvgM, FedAdam, FedYogi and FedAdagrad. They read whole
models from messages, so each round they get one: the mean model, which has been summed without
rounding before. Two things are not left to them. FedAdam corrects the bias of its moments for one
round more than there were, so it is told the number of the round before; and they forget all when
a run stops, so their moments are kept with the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from fedlora_app.config.schema import AVERAGING_MODES, FederatedConfig
from fedlora_app.model.adapter_state import AdapterState

SEPARATOR = "/"
ROUNDS, VELOCITY = "rounds", "velocity"
ADAPTIVE_LEARNING_RATE = 1e-3
WEIGHT = "num-examples"
"""What Flower's strategies weight a reply by."""


class _MeanReply(NamedTuple):
    """What Flower's strategies read of a reply; its ``Message`` can be made within a run only."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


class ServerOptimizer:
    """Turns the mean of what clients trained into the next global adapter.

    Every tensor has moments of its own, which only move in rounds in which it travels.
    """

    def __init__(self, federated: FederatedConfig) -> None:
        name, momentum = federated.server_optimizer, federated.server_momentum
        given = federated.server_learning_rate
        if federated.mode not in AVERAGING_MODES:  # there is no mean to go on from
            name, given = "none", None
        self._is_adaptive = name in ("adam", "yogi", "adagrad")
        default = ADAPTIVE_LEARNING_RATE if self._is_adaptive else 1.0
        rate = given or default
        common = {"eta": rate, "tau": federated.server_tau}
        betas = {"beta_1": momentum, "beta_2": federated.server_beta_2}
        build: dict[str, Callable[[], Any]] = {
            "none": lambda: FedAvgM(server_learning_rate=rate),
            "momentum": lambda: FedAvgM(server_learning_rate=rate, server_momentum=momentum),
            "adam": lambda: FedAdam(**common, **betas),
            "yogi": lambda: FedYogi(**common, **betas),
            "adagrad": lambda: FedAdagrad(**common),
        }
        self._strategy = build[name]()
        self._does_nothing = name == "none" and rate == 1.0
        self._moments: dict[str, dict[str, np.ndarray]] = {}

    def step(self, state: AdapterState, mean: AdapterState) -> AdapterState:
        """Return the next global adapter, fp32.

        Args:
            state: what the clients received.
            mean: what they have trained, on average; other tensors than these stay.
        """
        moved = {key: tensor for key, tensor in mean.items() if tensor is not state[key]}
        if self._does_nothing or not moved:
            return mean
        received = {key: state[key].double().numpy() for key in moved}
        count = self._recall(ROUNDS, received)
        number = 1 + int(next(iter(count.values())).max())
        strategy = self._strategy
        if self._is_adaptive:
            strategy.current_arrays = received
            strategy.m_t, strategy.v_t = (
                self._recall("m_t", received),
                self._recall("v_t", received),
            )
        else:
            strategy.current_arrays = _pack(received)
            strategy.momentum_vector = list(self._recall(VELOCITY, received).values())
        trained = _pack({key: tensor.double().numpy() for key, tensor in moved.items()})
        content = RecordDict({"arrays": trained, "metrics": MetricRecord({WEIGHT: 1})})
        arrays, _ = strategy.aggregate_train(number - 1, [_MeanReply(content)])
        if self._is_adaptive:
            self._keep("m_t", strategy.m_t)
            self._keep("v_t", strategy.v_t)
        else:
            self._keep(VELOCITY, dict(zip(received, strategy.momentum_vector or (), strict=False)))
        self._keep(ROUNDS, {key: np.full(1, float(number)) for key in received})
        return mean | {key: torch.from_numpy(arrays[key].numpy()).float() for key in received}

    @property
    def memory(self) -> AdapterState:
        """All moments, fp64, the name of each before the tensor's."""
        return {
            f"{name}{SEPARATOR}{key}": torch.from_numpy(np.ascontiguousarray(array))
            for name, arrays in self._moments.items()
            for key, array in arrays.items()
        }

    def recall(self, memory: AdapterState) -> None:
        """Go on from what ``memory`` was after an earlier round."""
        self._moments = {}
        for name, tensor in memory.items():
            moment, _, key = name.partition(SEPARATOR)
            self._moments.setdefault(moment, {})[key] = tensor.numpy()

    def _recall(self, name: str, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = self._moments.get(name, {})
        return {key: known.get(key, np.zeros_like(array)) for key, array in like.items()}

    def _keep(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        self._moments.setdefault(name, {}).update(arrays)


def _pack(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({key: Array(array) for key, array in arrays.items()})
