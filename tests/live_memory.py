"""The bytes that live tensors hold, and their peak: what torch counts on a GPU, on any device."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Follows the storages of all tensors that operations return inside the block.

    ``live`` and ``peak`` are bytes beside the tensors that were there before. What an operation
    holds only while it runs is not seen. Works on fake tensors too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_iter((args, kwargs)):  # there before, or seen
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, tensor: torch.Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.live += size
        self._known[key] = weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]
