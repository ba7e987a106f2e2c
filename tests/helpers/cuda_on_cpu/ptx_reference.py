"""What PTX instructions compute, on Python's integers and numpy's floats, from the text of the PTX ISA.

Everything is read off the opcode; nothing comes from the translation that is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

Number = int | np.floating

_FLOATS: dict[str, Any] = {"f32": np.float32, "f64": np.float64}


def evaluate(opcode: str, sources: Sequence[int]) -> int:
    """The bits of the result, as many as its register has, from those of the sources."""
    head, _, kind = opcode.rpartition(".")
    with np.errstate(all="ignore"):
        if head.startswith("setp."):
            return _compare(head.split(".")[1:], kind, sources)
        if head.startswith("cvt."):
            return _convert(head.split(".")[1:], kind, sources)
        if head == "selp":
            return sources[0] if sources[2] else sources[1]
        if kind in _FLOATS:
            return bits_of(_FLOAT_OPERATIONS[head.removesuffix(".rn")](*(_read(kind, raw) for raw in sources)), kind)
        return _integer(head, kind, sources)


def bits_of(value: Number, kind: str) -> int:
    """A float's bits; every NaN is the canonical one."""
    if np.isnan(value):
        return 0x7FFFFFFF if kind == "f32" else 0x7FFFFFFFFFFFFFFF
    return int(np.array(value, dtype=_FLOATS[kind]).view(f"u{int(kind[1:]) // 8}"))


def _read(kind: str, raw: int) -> Number:
    if kind in _FLOATS:
        return _FLOATS[kind](np.array(raw, dtype=f"u{int(kind[1:]) // 8}").view(_FLOATS[kind]))
    width = int(kind[1:])
    value = raw % (1 << width)
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def _integer(head: str, kind: str, sources: Sequence[int]) -> int:
    if kind == "pred":
        return _INTEGER_OPERATIONS[head](1, *sources) % 2
    width = int(kind[1:])
    if head == "bfe":
        return _bfe(kind[0] == "s", *sources)
    values = [_read(kind, raw) for raw in sources]
    if head == "mad.wide":
        values[2] = sources[2]
    return _INTEGER_OPERATIONS[head](width, *values) % (1 << (2 * width if head.endswith("wide") else width))


def _quotient(a: int, b: int) -> int:
    magnitude = abs(a) // abs(b)
    return magnitude if (a < 0) == (b < 0) else -magnitude


def _lop3(width: int, a: int, b: int, c: int, table: int) -> int:
    rows = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(width))
    return sum((table >> row & 1) << i for i, row in enumerate(rows))


def _prmt(width: int, a: int, b: int, selector: int) -> int:
    pool = (b << 32 | a).to_bytes(8, "little")
    chosen = bytearray()
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = pool[nibble & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(chosen, "little")


def _bfi(width: int, field: int, value: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(min(length, width - position)):
        value = value & ~(1 << (position + i)) | (field >> i & 1) << (position + i)
    return value


def _bfe(signed: bool, value: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    above = value >> min(position + length - 1, 31) & 1 if signed and length else 0
    bits = (value >> (position + i) & 1 if i < length and position + i <= 31 else above for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def _fma(a: np.floating, b: np.floating, c: np.floating) -> np.floating:
    """Rounded once, from the exact sum."""
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0 or abs(exact) > float(np.finfo(type(a)).max):
        return a * b + c
    near = type(a)(float(exact))
    beside = (near, np.nextafter(near, type(a)(-np.inf)), np.nextafter(near, type(a)(np.inf)))
    return min(
        (value for value in beside if np.isfinite(value)),
        key=lambda value: (abs(Fraction(float(value)) - exact), bits_of(value, f"f{8 * value.itemsize}") % 2),
    )


def _least(a: np.floating, b: np.floating) -> np.floating:
    """numpy's does not tell the zeros apart."""
    return (a if np.signbit(a) else b) if a == b else np.fmin(a, b)


_FLOAT_OPERATIONS: dict[str, Callable[..., np.floating]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": _fma,
    "neg": lambda a: -a,
    "abs": abs,
    "min": _least,
    "max": lambda a, b: -_least(-a, -b),
}


def _compare(words: Sequence[str], kind: str, sources: Sequence[int]) -> int:
    a, b = (_read(kind, raw) for raw in sources[:2])
    name, *logic = words
    unordered = kind in _FLOATS and bool(np.isnan(a) or np.isnan(b))
    if name in ("num", "nan"):
        result = unordered == (name == "nan")
    elif kind in _FLOATS and len(name) == 3:
        result = unordered or _holds(name[:2], a, b)
    else:
        result = not unordered and _holds(name, a, b)
    return _INTEGER_OPERATIONS[logic[0]](1, int(result), sources[2]) if logic else int(result)


def _holds(name: str, a: Number, b: Number) -> bool:
    return bool({"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name])


def _convert(words: Sequence[str], kind: str, sources: Sequence[int]) -> int:
    to = words[-1]
    if to.startswith(("f16", "bf16")):
        halves = [_half_bits(to.removesuffix("x2"), raw) for raw in reversed(sources)]  # the first goes to the top
        return sum(half << 16 * i for i, half in enumerate(halves))
    if kind in ("f16", "bf16"):
        half = torch.tensor(sources[0] % (1 << 16), dtype=torch.uint16).view(_HALVES[kind])
        return bits_of(np.float32(half.float().item()), "f32")
    value = _read(kind, sources[0])
    if to in _FLOATS:  # numpy rounds its 64-bit integers once, Python's would become fp64 before that
        exact = np.array(value, dtype=_FLOATS.get(kind, np.uint64 if kind[0] == "u" else np.int64))
        return bits_of(_FLOATS[to](exact), to)
    width, signed = int(to[1:]), to[0] == "s"
    if kind in _FLOATS:  # to an integer: towards zero, held within its type
        low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
        if not np.isfinite(value):
            return (0 if np.isnan(value) else low if value < 0 else high) % (1 << width)
        value = min(max(int(value), low), high)
    return int(value) % (1 << width)


_HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def _half_bits(kind: str, raw: int) -> int:
    half = torch.tensor(raw % (1 << 32), dtype=torch.uint32).view(torch.float32).to(_HALVES[kind])
    return 0x7FFF if half.isnan() else int(half.view(torch.uint16))


_INTEGER_OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda width, a, b: a + b,
    "sub": lambda width, a, b: a - b,
    "mul.lo": lambda width, a, b: a * b,
    "mul.wide": lambda width, a, b: a * b,
    "mul.hi": lambda width, a, b: a * b >> width,
    "mad.lo": lambda width, a, b, c: a * b + c,
    "mad.wide": lambda width, a, b, c: a * b + c,
    "div": lambda width, a, b: _quotient(a, b),
    "rem": lambda width, a, b: a - b * _quotient(a, b),
    "min": lambda width, a, b: min(a, b),
    "max": lambda width, a, b: max(a, b),
    "neg": lambda width, a: -a,
    "abs": lambda width, a: abs(a),
    "and": lambda width, a, b: a & b,
    "or": lambda width, a, b: a | b,
    "xor": lambda width, a, b: a ^ b,
    "not": lambda width, a: ~a,
    "shl": lambda width, a, count: a << min(count, width),
    "shr": lambda width, a, count: a >> min(count, width),
    "lop3": _lop3,
    "prmt": _prmt,
    "bfi": _bfi,
}
