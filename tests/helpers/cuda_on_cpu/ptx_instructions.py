"""PTX instructions that are one C++ expression of their operands.

A register is an unsigned integer of 16, 32 or 64 bits, a float, a double or a bool. A source is cast to the type that
its instruction reads, and a result to that of its register.
"""

from __future__ import annotations

from typing import NamedTuple

CPP_TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}
"""What a PTX type is in C++."""

WIDTHS = {name: 1 if name == "pred" else int(name[1:]) for name in CPP_TYPES}
"""Bits of each type."""

_ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INTEGER_COMPARISONS = {name: f"{{0}} {sign} {{1}}" for name, sign in {**_ORDERED, "ne": "!="}.items()}
_FLOAT_COMPARISONS = {  # false of a NaN, or with a u at their end true of it
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _ORDERED.items()},
    "ne": "{0} < {1} || {0} > {1}",
    "equ": "!({0} < {1} || {0} > {1})",
    "neu": "{0} != {1}",
    "ltu": "!({0} >= {1})",
    "leu": "!({0} > {1})",
    "gtu": "!({0} <= {1})",
    "geu": "!({0} < {1})",
    "num": "{0} == {0} && {1} == {1}",
    "nan": "{0} != {0} || {1} != {1}",
}


class Expression(NamedTuple):
    """C++ with {0}, {1}, .. for the sources and {line} for the place; the types of the result and of the sources."""

    cpp: str
    result: str
    sources: tuple[str, ...]


Table = dict[str, Expression]


def _arithmetic(kind: str) -> Table:
    """Of an integer type; what wraps around is computed without a sign, in C++ too wide a type for 16 bits."""
    unsigned, two = f"u{kind[1:]}", (kind, kind)
    table = {
        f"add.{kind}": Expression("{0} + {1}", kind, (unsigned,) * 2),
        f"sub.{kind}": Expression("{0} - {1}", kind, (unsigned,) * 2),
        f"mul.lo.{kind}": Expression("1u * {0} * {1}", kind, (unsigned,) * 2),
        f"mad.lo.{kind}": Expression("1u * {0} * {1} + {2}", kind, (unsigned,) * 3),
        f"div.{kind}": Expression("ptx::quotient({0}, {1}, {line})", kind, two),
        f"rem.{kind}": Expression("ptx::remainder({0}, {1}, {line})", kind, two),
        f"min.{kind}": Expression("std::min({0}, {1})", kind, two),
        f"max.{kind}": Expression("std::max({0}, {1})", kind, two),
        f"shr.{kind}": Expression("ptx::shift_right({0}, {1})", kind, (kind, "u32")),
    }
    if kind[0] == "s":
        table[f"neg.{kind}"] = Expression("0u - {0}", kind, (unsigned,))
        table[f"abs.{kind}"] = Expression("ptx::absolute({0})", kind, (kind,))
    return table


def _wide_products(kind: str) -> Table:
    """Of a type of 16 or 32 bits: the whole product, and its upper half."""
    bits = WIDTHS[kind]
    wide = f"{kind[0]}{2 * bits}"
    product = f"{CPP_TYPES[wide]}({{0}}) * {{1}}"
    return {
        f"mul.wide.{kind}": Expression(product, wide, (kind,) * 2),
        f"mad.wide.{kind}": Expression(f"uint64_t({product}) + {{2}}", wide, (kind, kind, f"u{2 * bits}")),
        f"mul.hi.{kind}": Expression(f"({product}) >> {bits}", kind, (kind,) * 2),
    }


def _bits(bits: int) -> Table:
    kind = f"b{bits}"
    return {
        **{f"{name}.{kind}": Expression(f"{{0}} {sign} {{1}}", kind, (kind,) * 2) for name, sign in _LOGIC.items()},
        f"not.{kind}": Expression("~{0}", kind, (kind,)),
        f"shl.{kind}": Expression("ptx::shift_left({0}, {1})", kind, (kind, "u32")),
        f"shr.{kind}": Expression("ptx::shift_right({0}, {1})", kind, (kind, "u32")),
    }


_LOGIC = {"and": "&", "or": "|", "xor": "^"}


def _predicates() -> Table:
    """Operations on predicates, comparisons that may combine with a predicate, and choices by one."""
    table = {f"{name}.pred": Expression(f"{{0}} {sign} {{1}}", "pred", ("pred",) * 2) for name, sign in _LOGIC.items()}
    table["not.pred"] = Expression("!{0}", "pred", ("pred",))
    for kind, bits in WIDTHS.items():
        if bits < 16:
            continue
        table[f"selp.{kind}"] = Expression("{2} ? {0} : {1}", kind, (kind, kind, "pred"))
        comparisons = _FLOAT_COMPARISONS if kind[0] == "f" else _INTEGER_COMPARISONS
        for name, test in comparisons.items():
            if kind[0] == "b" and name not in ("eq", "ne"):
                continue
            table[f"setp.{name}.{kind}"] = Expression(test, "pred", (kind,) * 2)
            for logic, sign in _LOGIC.items():
                combined = Expression(f"({test}) {sign} {{2}}", "pred", (kind, kind, "pred"))
                table[f"setp.{name}.{logic}.{kind}"] = combined
    return table


def _floating(kind: str) -> Table:
    """Each rounds once, to nearest; without a rounding in its name an instruction means the same."""
    two, fma = (kind,) * 2, f"__builtin_fma{'f' * (kind == 'f32')}"
    operations = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div.rn": "{0} / {1}"}
    operations |= {f"{name}.rn": operations[name] for name in ("add", "sub", "mul")}
    table = {f"{name}.{kind}": Expression(f"ptx::canonical({cpp})", kind, two) for name, cpp in operations.items()}
    table[f"fma.rn.{kind}"] = Expression(f"ptx::canonical({fma}({{0}}, {{1}}, {{2}}))", kind, (kind,) * 3)
    return table


def _conversions() -> Table:
    integers = [f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)]
    wide = [kind for kind in integers if WIDTHS[kind] > 8]
    table = {
        f"cvt.{to}.{source}": Expression("{0}", to, (source,)) for to in wide for source in integers if to != source
    }
    table |= {f"cvt.rn.f32.{kind}": Expression("static_cast<float>({0})", "f32", (kind,)) for kind in wide}
    for kind in wide:
        if WIDTHS[kind] > 16:
            table[f"cvt.rzi.{kind}.f32"] = Expression(f"ptx::truncated<{CPP_TYPES[kind]}>({{0}})", kind, ("f32",))
    for half in ("f16", "bf16"):
        pair = f"ptx::to_{half}({{1}}) | uint32_t(ptx::to_{half}({{0}})) << 16"  # the first source goes to the top
        table[f"cvt.rn.{half}.f32"] = Expression(f"ptx::to_{half}({{0}})", "b16", ("f32",))
        table[f"cvt.rn.{half}x2.f32"] = Expression(pair, "b32", ("f32", "f32"))
        table[f"cvt.f32.{half}"] = Expression(f"ptx::from_{half}({{0}})", "f32", ("b16",))
    table["cvt.f64.f32"] = Expression("ptx::canonical(static_cast<double>({0}))", "f64", ("f32",))
    table["cvt.rn.f32.f64"] = Expression("ptx::canonical(static_cast<float>({0}))", "f32", ("f64",))
    return table


_SINGLE: Table = {
    "neg.f32": Expression("ptx::canonical(-{0})", "f32", ("f32",)),
    "abs.f32": Expression("ptx::canonical(__builtin_fabsf({0}))", "f32", ("f32",)),
    "min.f32": Expression("ptx::minimum({0}, {1})", "f32", ("f32", "f32")),
    "max.f32": Expression("ptx::maximum({0}, {1})", "f32", ("f32", "f32")),
    "lop3.b32": Expression("ptx::lop3({0}, {1}, {2}, {3})", "b32", ("b32",) * 4),
    "prmt.b32": Expression("ptx::prmt({0}, {1}, {2})", "b32", ("b32",) * 3),
    "bfi.b32": Expression("ptx::insert_bits({0}, {1}, {2}, {3})", "b32", ("b32",) * 4),
    "bfe.u32": Expression("ptx::extract_bits({0}, {1}, {2})", "b32", ("u32",) * 3),
    "bfe.s32": Expression("ptx::extract_bits({0}, {1}, {2})", "b32", ("s32", "u32", "u32")),
    # Generic addresses are pointers, and those of global memory the same.
    "cvta.global.u64": Expression("{0}", "u64", ("u64",)),
    "cvta.to.global.u64": Expression("{0}", "u64", ("u64",)),
    "cvta.shared.u64": Expression("ptx::shared_to_generic({0})", "u64", ("u64",)),
    "cvta.to.shared.u64": Expression("ptx::generic_to_shared({0}, {line})", "u64", ("u64",)),
}


def _every() -> Table:
    table = dict(_SINGLE)
    for bits in (16, 32, 64):
        table |= _bits(bits)
        for sign in "su":
            table |= _arithmetic(f"{sign}{bits}")
            if bits < 64:
                table |= _wide_products(f"{sign}{bits}")
    return table | _predicates() | _floating("f32") | _floating("f64") | _conversions()


EXPRESSIONS = _every()
"""By opcode with all its suffixes; what is not here and no operation of ptx.py is refused."""
