"""Global memory of an emulated launch: buffers between protected pages."""

from __future__ import annotations

import ctypes
import mmap

import torch

_PAGE = mmap.PAGESIZE
_PROTECTED = 2**20  # bytes on each side; so far may a wrong row lie
_MAP_NORESERVE = 0x4000  # of Linux; the module has it from Python 3.13 on
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_LIBC = ctypes.CDLL(None, use_errno=True)

FLOAT_GUARD = 0xFF
"""NaN in every float type: what lies before a buffer spoils whatever is computed from it."""

INDEX_GUARD = 0x7F
"""As an index, far beyond every buffer; -1 would be a valid one."""


IN_PLACE_BYTES = 2**31
"""A tensor of more is not copied: ``sparse_zeros`` made it."""


def _map(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Memory between protected pages, and the address of its first byte; pages appear as they are touched."""
    mapping = mmap.mmap(-1, num_bytes + 2 * _PROTECTED, _FLAGS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    _protect(start, _PROTECTED, 0)
    _protect(start + _PROTECTED + num_bytes, _PROTECTED, 0)
    return mapping, start + _PROTECTED


def _protect(address: int, length: int, protection: int) -> None:
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def sparse_zeros(num_rows: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that may be larger than the machine's memory: only pages that somebody writes take any."""
    num_bytes = num_rows * num_columns * dtype.itemsize
    if num_bytes % _PAGE or num_bytes <= IN_PLACE_BYTES:
        raise ValueError(f"{num_bytes} bytes are not whole pages, or fewer than a launch takes in place")
    mapping, _ = _map(num_bytes)
    return torch.frombuffer(mapping, dtype=dtype, count=num_rows * num_columns, offset=_PROTECTED).view(num_rows, -1)


class GuardedBuffer:
    """A copy of a tensor that ends at a protected page, to the byte; a tensor of ``sparse_zeros`` itself.

    A read or write behind the end is a fault. Before the start stand, down to the next protected page, guard bytes
    that ``copy_back`` checks. A buffer that is not ``writable`` is protected from writes.
    """

    def __init__(self, tensor: torch.Tensor, writable: bool) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
        self._tensor = tensor
        self.writable = writable
        self.num_bytes = tensor.numel() * tensor.element_size()
        self._in_place = self.num_bytes > IN_PLACE_BYTES
        if self._in_place:
            self.address = tensor.data_ptr()
            return
        space = -(-self.num_bytes // _PAGE) * _PAGE
        self._mapping, self._first = _map(space)
        self.address = self._first + space - self.num_bytes
        self._guard = bytes([FLOAT_GUARD if tensor.is_floating_point() else INDEX_GUARD]) * (space - self.num_bytes)
        ctypes.memmove(self._first, self._guard, len(self._guard))
        ctypes.memmove(self.address, tensor.data_ptr(), self.num_bytes)
        if space and not writable:
            _protect(self._first, space, mmap.PROT_READ)

    def copy_back(self) -> bool:
        """Brings the bytes into the tensor; whether the guard before them is untouched."""
        if self._in_place:
            return True
        if self.writable:
            ctypes.memmove(self._tensor.data_ptr(), self.address, self.num_bytes)
        return ctypes.string_at(self._first, len(self._guard)) == self._guard
