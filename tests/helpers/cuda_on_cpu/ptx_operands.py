"""Operands of PTX instructions in C++: registers are variables of their width, without a sign."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from tests.helpers.cuda_on_cpu.ptx_instructions import CPP_TYPES, WIDTHS

_FIELDS = {"tid": "thread_index", "ctaid": "block_index", "ntid": "block_dim", "nctaid": "grid_dim"}
SPECIAL_REGISTERS = {f"%{ptx}.{axis}": f"ptx::state.{cpp}.{axis}" for ptx, cpp in _FIELDS.items() for axis in "xyz"}

_REGISTERS = re.compile(r"\.reg \.(\w+)\s+%([a-z_]+)<(\d+)>")
_ADDRESS = re.compile(r"\[(%?\w+)(?:\+(-?\d+))?\]")
_LITERAL = re.compile(r"-?\d+|0[fF][0-9a-fA-F]{8}|0x[0-9a-fA-F]+")


class PtxError(ValueError):
    """PTX that the translation does not cover; the message names the line."""


class Operands:
    """The registers of one entry, and what its operands are."""

    def __init__(self, entry: str, parameters: Mapping[str, str], shared_symbols: Collection[str]) -> None:
        self.line = 0
        """Of the statement at hand, in the PTX text."""
        self._entry = entry
        self._parameters = parameters
        self._shared_symbols = shared_symbols
        self._declared: dict[str, tuple[str, int]] = {}
        self._used: dict[str, str] = {}

    def error(self, what: str) -> PtxError:
        """To be raised."""
        return PtxError(f"line {self.line} of the PTX, in {self._entry}: {what}")

    def declare(self, text: str) -> None:
        """Takes note of a .reg declaration."""
        match = _REGISTERS.fullmatch(text)
        if not match or match[1] not in CPP_TYPES:
            raise self.error(f"the declaration {text!r}")
        self._declared[match[2]] = match[1], int(match[3])

    def definitions(self) -> list[str]:
        """C++ variables for the registers that were used; what is read before it is written is poison."""
        return [f"{CPP_TYPES[kind]} {name} = ptx::poison<{CPP_TYPES[kind]}>();" for name, kind in self._used.items()]

    def kind(self, register: str) -> str:
        """The declared type of a register."""
        match = re.fullmatch(r"%([a-z_]+)(\d+)", register)
        kind, count = self._declared.get(match[1], ("", 0)) if match else ("", 0)
        if not match or int(match[2]) >= count:
            raise self.error(f"register {register} is not declared")
        self._used[register[1:]] = kind
        return kind

    def source(self, operand: str, kind: str, narrower: bool = False) -> str:
        """The operand as a value of ``kind``; ``narrower``: of which the register may be wider."""
        if operand in SPECIAL_REGISTERS and kind in ("u32", "b32"):
            return SPECIAL_REGISTERS[operand]
        if operand in self._shared_symbols and kind in ("u32", "b32", "u64", "b64"):
            return f"{CPP_TYPES[kind]}(ptx::SHARED_WINDOW)"
        if _LITERAL.fullmatch(operand):
            return self._literal(operand, kind)
        negated, register = operand[0] == "!", operand.lstrip("!")
        held = self.kind(register)
        fits = WIDTHS[held] == WIDTHS[kind] or (narrower and _extends(kind, held))
        if not fits or (negated and kind != "pred"):
            raise self.error(f"{operand} is of type .{held}, not .{kind}")
        if "f" in (held[0], kind[0]) and held != kind:
            return f"ptx::bits_as<{CPP_TYPES[kind]}>({register[1:]})"
        return f"{'!' * negated}{CPP_TYPES[kind]}({register[1:]})"

    def _literal(self, text: str, kind: str) -> str:
        if kind == "pred" and text in ("0", "-1"):
            return "true" if text == "-1" else "false"
        width = WIDTHS[kind]
        is_float = text[:2].lower() == "0f"
        if kind == "pred" or is_float != (kind == "f32"):
            raise self.error(f"{text} is no .{kind}")
        value = int(text[2:], 16) if is_float else int(text, 0)
        if not -(1 << (width - 1)) <= value < 1 << width:
            raise self.error(f"{text} does not fit in .{kind}")
        return f"ptx::bits_as<{CPP_TYPES[kind]}>(uint{width}_t(0x{value % (1 << width):x}))"

    def assign(self, register: str, kind: str, cpp: str, wider: bool = False) -> str:
        """The value of ``kind`` goes to a register of its width; ``wider``: or to one that it is extended to."""
        held = self.kind(register)
        if WIDTHS[held] != WIDTHS[kind] and not (wider and _extends(kind, held)):
            raise self.error(f"{register} is of type .{held}, not .{kind}")
        value = f"static_cast<{CPP_TYPES[kind]}>({cpp})"
        if "f" in (held[0], kind[0]) and held != kind:
            value = f"ptx::bits_as<{CPP_TYPES[held]}>({value})"
        return f"{register[1:]} = {value};"

    def address(self, operand: str, space: str) -> str:
        """An address in brackets; only shared memory is within 32 bits."""
        match = _ADDRESS.fullmatch(operand)
        if not match:
            raise self.error(f"address {operand}")
        base, offset = match[1], int(match[2] or 0)
        if base in self._shared_symbols and space == "shared":
            return f"ptx::SHARED_WINDOW + {offset}"
        if base[0] != "%":
            raise self.error(f"address {operand} in {space or 'generic'} memory")
        kind = "u32" if space == "shared" and WIDTHS[self.kind(base)] == 32 else "u64"
        return f"{CPP_TYPES[kind]}({self.source(base, kind)} + {CPP_TYPES[kind]}({offset}))"

    def parameter(self, operand: str, kind: str) -> str:
        """A parameter of the entry."""
        name = operand.strip("[]")
        if WIDTHS[self._parameters.get(name, "pred")] != WIDTHS[kind]:
            raise self.error(f"{operand} is no parameter of type .{kind}")
        return f"({CPP_TYPES[kind]}){name}"

    def vector(self, operand: str, count: int) -> list[str]:
        """The registers of a list in braces."""
        parts = [part.strip() for part in operand.strip("{}").split(",")]
        if "{" not in operand or len(parts) != count:
            raise self.error(f"{operand} where {count} registers belong")
        return parts


def _extends(kind: str, held: str) -> bool:
    """Whether an integer of ``kind`` can stand in a wider register."""
    return "f" not in (held[0], kind[0]) and WIDTHS[held] > WIDTHS[kind] > 1
