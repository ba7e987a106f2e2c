"""PTX of small kernels, to test single instructions."""

from __future__ import annotations

from tests.helpers.cuda_on_cpu.ptx_instructions import WIDTHS

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 128 .b8 memory[];\n"

_KINDS = {"p": "pred", "h": "b16", "r": "b32", "d": "b64", "f": "f32"}
_REGISTERS = "".join(f".reg .{kind} \t%{letter}<20>;\n" for letter, kind in _KINDS.items())


def letter_of(kind: str) -> str:
    """Of the registers that hold values of this type."""
    return "f" if kind == "f32" else {1: "p", 16: "h", 32: "r", 64: "d"}[WIDTHS[kind]]


def entry(name: str, body: str, num_parameters: int = 1) -> str:
    """A kernel whose parameters are pointers, without ``HEAD``.

    It has twenty registers of every kind; %r10 is the thread's number, %d10 the first parameter, %d11 the second, ..
    """
    declared = ",\n".join(f"\t.param .u64 {name}_param_{i}" for i in range(num_parameters))
    loads = "".join(f"ld.param.u64 %d{10 + i}, [{name}_param_{i}];\n" for i in range(num_parameters))
    head = f".visible .entry {name}(\n{declared}\n)\n{{\n{_REGISTERS}mov.u32 %r10, %tid.x;\n{loads}"
    return f"{head}{body}\nret;\n}}\n"
