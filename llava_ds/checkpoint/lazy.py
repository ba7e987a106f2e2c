"""Tensors that stay on disk until they are read, whole or in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

PIECE_ELEMENTS = 1 << 20
"""Elements that are read at a time: 4 MiB in fp32, which stay in a core's cache until they are written."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known dtype and shape; ``read(start, stop)`` gives that range of the flattened tensor, 1-D.

    ``origin`` says where it is kept, for messages.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    origin: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size as stored under its dtype."""
        return self.numel * self.dtype.itemsize

    def whole(self) -> torch.Tensor:
        """The tensor in its shape and dtype."""
        return self.read(0, self.numel).to(self.dtype).reshape(self.shape)

    def pieces(self, piece_elements: int = PIECE_ELEMENTS) -> Iterator[torch.Tensor]:
        """The flattened tensor in order, in its dtype, no more than ``piece_elements`` at a time."""
        for start in range(0, self.numel, piece_elements):
            yield self.read(start, min(self.numel, start + piece_elements)).to(self.dtype)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The same values, rounded to ``dtype``."""
        return LazyTensor(dtype, self.shape, self.read, self.origin)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows ``start`` to ``stop`` of the first dimension."""
        width = math.prod(self.shape[1:])

        def read(first: int, last: int) -> torch.Tensor:
            return self.read(start * width + first, start * width + last)

        return LazyTensor(self.dtype, (stop - start, *self.shape[1:]), read, self.origin)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]) -> LazyTensor:
        """What ``function`` makes of the whole tensor; it is made anew for every read, so read it whole."""

        def read(start: int, stop: int) -> torch.Tensor:
            return function(self.whole()).flatten()[start:stop]

        return LazyTensor(self.dtype, tuple(shape), read, self.origin)


def in_memory(value: torch.Tensor, origin: str = "memory") -> LazyTensor:
    """A tensor that is in memory already."""
    flat = value.detach().flatten()
    return LazyTensor(value.dtype, tuple(value.shape), lambda start, stop: flat[start:stop], origin)


def concatenated(parts: Sequence[LazyTensor], shape: Sequence[int] | None = None) -> LazyTensor:
    """The parts one after the other, along the first dimension (or as the flattened content of ``shape``)."""
    first = parts[0]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.numel)

    def read(start: int, stop: int) -> torch.Tensor:
        taken = [
            part.read(max(start, begin) - begin, min(stop, begin + part.numel) - begin)
            for part, begin in zip(parts, starts, strict=False)
            if begin < stop and start < begin + part.numel
        ]
        if len(taken) == 1:
            return taken[0]
        return torch.cat(taken) if taken else torch.empty(0, dtype=first.dtype)

    whole = tuple(shape) if shape is not None else (sum(part.shape[0] for part in parts), *first.shape[1:])
    return LazyTensor(first.dtype, whole, read, first.origin)
