"""Global memory of an emulated launch: buffers between protected pages."""

from __future__ import annotations

import ctypes
import mmap

import torch

_PAGE = mmap.PAGESIZE
_PROTECTED = 2**20  # bytes on each side; so far may a wrong row lie
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_LIBC = ctypes.CDLL(None, use_errno=True)

FLOAT_GUARD = 0xFF
"""NaN in every float type: what lies before a buffer spoils whatever is computed from it."""

INDEX_GUARD = 0x7F
"""As an index, far beyond every buffer; -1 would be a valid one."""


class GuardedBuffer:
    """A copy of a tensor that ends at a protected page, to the byte.

    A read or write behind the end is a fault. Before the start stand, down to the next protected page, guard bytes
    that ``copy_back`` checks. A buffer that is not ``writable`` is protected from writes.
    """

    def __init__(self, tensor: torch.Tensor, writable: bool) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
        self._tensor = tensor
        self.writable = writable
        self.num_bytes = tensor.numel() * tensor.element_size()
        space = -(-self.num_bytes // _PAGE) * _PAGE
        self._mapping = mmap.mmap(-1, space + 2 * _PROTECTED, _FLAGS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._first = start + _PROTECTED
        self.address = self._first + space - self.num_bytes
        self._guard = bytes([FLOAT_GUARD if tensor.is_floating_point() else INDEX_GUARD]) * (space - self.num_bytes)
        ctypes.memmove(self._first, self._guard, len(self._guard))
        ctypes.memmove(self.address, tensor.data_ptr(), self.num_bytes)
        self._protect(start, _PROTECTED, 0)
        self._protect(self._first + space, _PROTECTED, 0)
        if space and not writable:
            self._protect(self._first, space, mmap.PROT_READ)

    @staticmethod
    def _protect(address: int, length: int, protection: int) -> None:
        if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection):
            raise OSError(ctypes.get_errno(), "mprotect failed")

    def copy_back(self) -> bool:
        """Brings the bytes into the tensor; whether the guard before them is untouched."""
        if self.writable:
            ctypes.memmove(self._tensor.data_ptr(), self.address, self.num_bytes)
        return ctypes.string_at(self._first, len(self._guard)) == self._guard
