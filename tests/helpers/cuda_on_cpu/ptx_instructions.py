"""PTX instructions that are one C++ expression of their operands.

A register is an unsigned integer of 16, 32 or 64 bits, a float or a bool. A source is cast to the type that its
instruction reads, and a result to that of its register.

Known is what NVRTC 12 and 13 make of the kernel, and what stands near that.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

CPP_TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (16, 32, 64)},
    "f32": "float",
}
"""What a PTX type is in C++."""

WIDTHS = {name: 1 if name == "pred" else int(name[1:]) for name in CPP_TYPES}
"""Bits of each type."""

_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_EQUALITY = {"eq": "==", "ne": "!="}
_COMPARISONS = {**_EQUALITY, "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Expression(NamedTuple):
    """C++ with {0}, {1}, .. for the sources and {line} for the place; the types of the result and of the sources."""

    cpp: str
    result: str
    sources: tuple[str, ...]


Table = dict[str, Expression]


def _arithmetic(kind: str) -> Table:
    """Of an integer type; what wraps around is computed without a sign."""
    unsigned, two = f"u{kind[1:]}", (kind, kind)
    table = {
        f"add.{kind}": Expression("{0} + {1}", kind, (unsigned,) * 2),
        f"sub.{kind}": Expression("{0} - {1}", kind, (unsigned,) * 2),
        f"mul.lo.{kind}": Expression("{0} * {1}", kind, (unsigned,) * 2),
        f"mad.lo.{kind}": Expression("{0} * {1} + {2}", kind, (unsigned,) * 3),
        f"div.{kind}": Expression("ptx::quotient({0}, {1}, {line})", kind, two),
        f"min.{kind}": Expression("std::min({0}, {1})", kind, two),
        f"max.{kind}": Expression("std::max({0}, {1})", kind, two),
    }
    if kind[0] == "s":
        table[f"neg.{kind}"] = Expression("0u - {0}", kind, (unsigned,))
    return table | _comparisons(kind, _COMPARISONS) | _shift_right(kind)


def _comparisons(kind: str, signs: dict[str, str]) -> Table:
    two = (kind, kind)
    return {f"setp.{name}.{kind}": Expression(f"{{0}} {sign} {{1}}", "pred", two) for name, sign in signs.items()}


def _shift_right(kind: str) -> Table:
    return {f"shr.{kind}": Expression("ptx::shift_right({0}, {1})", kind, (kind, "u32"))}


def _wide_products(sign: str) -> Table:
    """The whole product of 32-bit integers."""
    kind, wide = f"{sign}32", f"{sign}64"
    product = f"{CPP_TYPES[wide]}({{0}}) * {{1}}"
    return {
        f"mul.wide.{kind}": Expression(product, wide, (kind,) * 2),
        f"mad.wide.{kind}": Expression(f"uint64_t({product}) + {{2}}", wide, (kind, kind, "u64")),
    }


def _logic(kind: str, negation: str) -> Table:
    two = (kind, kind)
    table = {f"{name}.{kind}": Expression(f"{{0}} {sign} {{1}}", kind, two) for name, sign in _LOGIC.items()}
    return table | {f"not.{kind}": Expression(f"{negation}{{0}}", kind, (kind,))}


def _bits(kind: str) -> Table:
    shift_left = {f"shl.{kind}": Expression("ptx::shift_left({0}, {1})", kind, (kind, "u32"))}
    return _logic(kind, "~") | _comparisons(kind, _EQUALITY) | shift_left | _shift_right(kind)


def _floating() -> Table:
    """Each rounds once, to nearest; without a rounding in its name an instruction means the same."""
    operations = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}"}
    table = {
        f"{name}{rounding}.f32": Expression(f"ptx::canonical({cpp})", "f32", ("f32",) * 2)
        for name, cpp in operations.items()
        for rounding in ("", ".rn")
    }
    return table | {
        "fma.rn.f32": Expression("ptx::canonical(__builtin_fmaf({0}, {1}, {2}))", "f32", ("f32",) * 3),
        "neg.f32": Expression("ptx::canonical(-{0})", "f32", ("f32",)),
        "min.f32": Expression("ptx::minimum({0}, {1})", "f32", ("f32",) * 2),
        "max.f32": Expression("ptx::canonical(-ptx::minimum(-{0}, -{1}))", "f32", ("f32",) * 2),
        "cvt.rn.f16.f32": Expression("ptx::to_f16({0})", "b16", ("f32",)),
        "cvt.rn.bf16.f32": Expression("ptx::to_bf16({0})", "b16", ("f32",)),
        "cvt.f32.f16": Expression("ptx::from_f16({0})", "f32", ("b16",)),
    }


def _every() -> Table:
    integers = [f"{sign}{bits}" for sign in "su" for bits in (16, 32, 64)]
    table = {
        "lop3.b32": Expression("ptx::lop3({0}, {1}, {2}, {3})", "b32", ("b32",) * 4),
        "bfi.b32": Expression("ptx::insert_bits({0}, {1}, {2}, {3})", "b32", ("b32",) * 4),
        "cvta.to.global.u64": Expression("{0}", "u64", ("u64",)),  # generic addresses are pointers, these are too
    }
    for kind in [*integers, "b16", "b32", "b64", "f32"]:
        table[f"selp.{kind}"] = Expression("{2} ? {0} : {1}", kind, (kind, kind, "pred"))
    for to, source in itertools.permutations(integers, 2):
        table[f"cvt.{to}.{source}"] = Expression("{0}", to, (source,))
    for bits in (32, 64):
        table |= _bits(f"b{bits}")
        for sign in "su":
            table |= _arithmetic(f"{sign}{bits}")
    return table | _wide_products("s") | _wide_products("u") | _logic("pred", "!") | _floating()


EXPRESSIONS = _every()
"""By opcode with all its suffixes; what is not here and no operation of ptx_translate.py is refused."""
