"""What PTX instructions compute, on Python's integers and numpy's floats, from the text of the PTX ISA.

Everything is read off the opcode; nothing comes from the translation that is tested against it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch


def evaluate(opcode: str, sources: Sequence[int]) -> int:
    """The bits of the result, as many as its register has, from those of the sources."""
    head, _, kind = opcode.rpartition(".")
    if head.startswith("cvt."):
        return _convert(head.split(".")[-1], kind, sources[0])
    if head == "selp":
        return sources[0] if sources[2] else sources[1]
    if kind == "f32":
        with np.errstate(all="ignore"):
            return _bits_of(_FLOAT_OPERATIONS[head.removesuffix(".rn")](*map(_float, sources)))
    width = 1 if kind == "pred" else int(kind[1:])
    values = [_integer(kind, raw) for raw in sources]
    if head.startswith("setp."):
        return int(_COMPARISONS[head.removeprefix("setp.")](*values))
    if head == "mad.wide":
        values[2] = sources[2]
    return _INTEGER_OPERATIONS[head](width, *values) % (1 << (2 * width if head.endswith("wide") else width))


def _bits_of(value: np.floating) -> int:
    """Every NaN is the canonical one."""
    return 0x7FFFFFFF if np.isnan(value) else int(np.float32(value).view(np.uint32))


def _float(raw: int) -> np.float32:
    return np.uint32(raw).view(np.float32)


def _integer(kind: str, raw: int) -> int:
    if kind == "pred":
        return raw
    width = int(kind[1:])
    value = raw % (1 << width)
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def _convert(to: str, kind: str, raw: int) -> int:
    if to in _HALVES:
        half = torch.tensor(float(_float(raw)), dtype=torch.float32).to(_HALVES[to])
        return 0x7FFF if half.isnan() else int(half.view(torch.uint16))
    if to == "f32":
        return _bits_of(np.float32(torch.tensor(raw, dtype=torch.uint16).view(_HALVES[kind]).item()))
    return _integer(kind, raw) % (1 << int(to[1:]))


_HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def _quotient(a: int, b: int) -> int:
    magnitude = abs(a) // abs(b)
    return magnitude if (a < 0) == (b < 0) else -magnitude


def _lop3(width: int, a: int, b: int, c: int, table: int) -> int:
    rows = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(width))
    return sum((table >> row & 1) << i for i, row in enumerate(rows))


def _bfi(width: int, field: int, value: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(min(length, width - position)):
        value = value & ~(1 << (position + i)) | (field >> i & 1) << (position + i)
    return value


def _fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Rounded once, from the exact sum."""
    wide = np.float64(a) * np.float64(b) + np.float64(c)  # where the product does not overflow
    if not np.isfinite(wide) or wide == 0 or abs(wide) > np.finfo(np.float32).max:
        return np.float32(wide)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    beside = (near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf)))
    return min(
        (value for value in beside if np.isfinite(value)),
        key=lambda value: (abs(Fraction(float(value)) - exact), _bits_of(value) % 2),
    )


def _least(a: np.float32, b: np.float32) -> np.float32:
    """Of a NaN and a number the number. numpy's does not tell the zeros apart."""
    return (a if np.signbit(a) else b) if a == b else np.fmin(a, b)


def _greatest(a: np.float32, b: np.float32) -> np.float32:
    return (b if np.signbit(a) else a) if a == b else np.fmax(a, b)


_FLOAT_OPERATIONS: dict[str, Callable[..., np.floating]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "fma": _fma,
    "neg": operator.neg,
    "min": _least,
    "max": _greatest,
}

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}

_INTEGER_OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda width, a, b: a + b,
    "sub": lambda width, a, b: a - b,
    "mul.lo": lambda width, a, b: a * b,
    "mul.wide": lambda width, a, b: a * b,
    "mad.lo": lambda width, a, b, c: a * b + c,
    "mad.wide": lambda width, a, b, c: a * b + c,
    "div": lambda width, a, b: _quotient(a, b),
    "min": lambda width, a, b: min(a, b),
    "max": lambda width, a, b: max(a, b),
    "neg": lambda width, a: -a,
    "and": lambda width, a, b: a & b,
    "or": lambda width, a, b: a | b,
    "xor": lambda width, a, b: a ^ b,
    "not": lambda width, a: ~a,
    "shl": lambda width, a, count: a << min(count, width),
    "shr": lambda width, a, count: a >> min(count, width),
    "lop3": _lop3,
    "bfi": _bfi,
    "cvta.to.global": lambda width, address: address,
}
