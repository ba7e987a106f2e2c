"""C++ from PTX text, instruction by instruction: registers are variables, labels are labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from tests.helpers.cuda_on_cpu.ptx_instructions import CPP_TYPES, EXPRESSIONS, WIDTHS
from tests.helpers.cuda_on_cpu.ptx_operands import Operands, PtxError

_ENTRY = re.compile(r"^(?:\.visible )?\.entry (\w+)\((.*?)\)(.*?)^\{$(.*?)^\}$", re.S | re.M)
_SHARED = re.compile(r"^\.extern \.shared \.align \d+ \.b8 (\w+)\[\];$", re.M)
_PARAMETER = re.compile(r"\.param \.(\w+) (\w+)")
_STATEMENT = re.compile(r"\s*(?:([\w$]+):|([^;]*);)")
_INSTRUCTION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|[^,\s{}\[\]]+")
_COMMA = re.compile(r"\s*,\s*(?![^{]*\})")  # not within braces


def translate(ptx: str) -> str:
    """C++ for ``runner.compile_source``: each entry of the PTX as a kernel of the same name.

    Raises:
        PtxError: something stands there whose meaning is not known exactly.
    """
    text = re.sub(r"//.*", "", ptx)
    symbols = frozenset(_SHARED.findall(text))
    outside = _SHARED.sub("", _ENTRY.sub("", text))
    for word in re.findall(r"\.(?:func|entry|shared|const|alias)\b", outside):
        raise PtxError(f"{word} outside the entries; known are entries and one extern shared array")
    if len(symbols) > 1:
        raise PtxError(f"{len(symbols)} extern shared arrays: they would be one")
    kernels = [_kernel(text, match, symbols) for match in _ENTRY.finditer(text)]
    if not kernels:
        raise PtxError("no entry")
    return "\n".join(['#include "ptx_matrices.h"', *kernels])


def _kernel(text: str, match: re.Match[str], symbols: Collection[str]) -> str:
    name, parameters, _, body = match.groups()
    kinds = {parameter: kind for kind, parameter in _PARAMETER.findall(parameters)}
    operands = Operands(name, kinds, symbols)
    operands.line = text.count("\n", 0, match.start(4)) + 1
    code = list(_code(body, operands))
    declared = ", ".join(f"{_parameter_type(kind, operands)} {parameter}" for parameter, kind in kinds.items())
    head = f'extern "C" __global__ void {name}({declared}) {{'
    return "\n".join([head, *operands.definitions(), *code, "}"])


def _parameter_type(kind: str, operands: Operands) -> str:
    """Pointers and integers of 64 bits look alike in PTX, and to the runner: both go where a pointer goes."""
    if not re.fullmatch(r"[bsu](32|64)", kind):
        raise operands.error(f"a parameter of type .{kind}")
    return {64: "void*", 32: "int"}[WIDTHS[kind]]


def _code(body: str, operands: Operands) -> Iterator[str]:
    end = 0
    while statement := _STATEMENT.match(body, end):
        start = statement.start(1 if statement[1] else 2)
        operands.line += body.count("\n", end, start)
        yield f"{_label(statement[1])}:;" if statement[1] else _statement(statement[2].strip(), operands)
        operands.line += body.count("\n", start, statement.end())
        end = statement.end()
    if body[end:].strip():
        raise operands.error(f"{body[end:].strip()[:80]!r} is no statement")


def _statement(text: str, operands: Operands) -> str:
    if text.startswith(".reg "):
        operands.declare(text)
        return ""
    if text == '.pragma "nounroll"':
        return ""
    match = _INSTRUCTION.fullmatch(text)
    if not match:
        raise operands.error(f"{text!r} is no instruction")
    guard, opcode, rest = match.groups()
    parts = _OPERAND.findall(rest)
    if ",".join(parts) != _COMMA.sub(",", rest.strip()):
        raise operands.error(f"operands {rest!r}")
    code = _instruction(opcode, parts, operands)
    return f"if ({operands.source(guard, 'pred')}) {{ {code} }}" if guard else code


def _instruction(opcode: str, parts: list[str], operands: Operands) -> str:
    if opcode in EXPRESSIONS:
        return _expression(opcode, parts, operands)
    for pattern, count, emit in _OPERATIONS:
        if match := re.fullmatch(pattern, opcode):
            if len(parts) != count:
                raise operands.error(f"{opcode} with {len(parts)} operands")
            return emit(operands, match, *parts)
    raise operands.error(f"opcode {opcode} is unknown")


def _expression(opcode: str, parts: list[str], operands: Operands) -> str:
    cpp, result, kinds = EXPRESSIONS[opcode]
    if len(parts) != 1 + len(kinds):
        raise operands.error(f"{opcode} with {len(parts)} operands")
    narrower = opcode.startswith("cvt.")
    values = [operands.source(part, kind, narrower) for part, kind in zip(parts[1:], kinds, strict=True)]
    return operands.assign(parts[0], result, cpp.format(*values, line=operands.line))


def _mov(operands: Operands, match: re.Match[str], target: str, source: str) -> str:
    kind = match[1]
    if "{" not in target + source:
        return operands.assign(target, kind, operands.source(source, kind))
    half = f"b{WIDTHS[kind] // 2}"
    if half not in ("b16", "b32"):
        raise operands.error(f"{match[0]} with halves")
    if "{" in source:
        low, high = (operands.source(part, half) for part in operands.vector(source, 2))
        return operands.assign(target, kind, f"{low} | {CPP_TYPES[kind]}({high}) << {WIDTHS[half]}")
    low, high = operands.vector(target, 2)
    whole = operands.source(source, kind)  # one of the halves may go where it stands
    assigned = operands.assign(low, half, "whole") + operands.assign(high, half, f"whole >> {WIDTHS[half]}")
    return f"{{ const auto whole = {whole}; {assigned} }}"


def _load_parameter(operands: Operands, match: re.Match[str], target: str, address: str) -> str:
    return operands.assign(target, match[1], operands.parameter(address, match[1]))


def _access(operands: Operands, match: re.Match[str], registers: str, address: str) -> tuple[list[str], str, str]:
    """Of a load or store: its registers, address and the arguments of the C++ template."""
    space, count, kind = match.groups()
    if kind not in CPP_TYPES or (not count and "{" in registers):
        raise operands.error(f"{match[0]} of {registers}")
    parts = operands.vector(registers, int(count)) if count else [registers]
    template = f"<ptx::Space::{space.upper()}, {CPP_TYPES[kind]}, {len(parts)}>"
    return parts, operands.address(address, space), template


def _load(operands: Operands, match: re.Match[str], registers: str, address: str) -> str:
    parts, where, template = _access(operands, match, registers, address)
    return _spread(operands, match[3], parts, f"ptx::load{template}({where}, {operands.line})")


def _store(operands: Operands, match: re.Match[str], address: str, registers: str) -> str:
    parts, where, template = _access(operands, match, registers, address)
    values = ", ".join(operands.source(part, match[3], narrower=True) for part in parts)
    return f"ptx::store{template}({where}, {{{values}}}, {operands.line});"


def _spread(operands: Operands, kind: str, parts: list[str], call: str) -> str:
    """The values that a call returns go to as many registers."""
    assigned = (operands.assign(part, kind, f"values[{i}]", wider=True) for i, part in enumerate(parts))
    return f"{{ const auto values = {call}; {' '.join(assigned)} }}"


def _branch(operands: Operands, match: re.Match[str], label: str) -> str:
    return f"goto {_label(label)};"


def _label(name: str) -> str:
    return "label_" + name.lstrip("$")


def _return(operands: Operands, match: re.Match[str]) -> str:
    return "return;"


def _trap(operands: Operands, match: re.Match[str]) -> str:
    return f"ptx::trap({operands.line});"


def _barrier(operands: Operands, match: re.Match[str], number: str) -> str:
    if number != "0":
        raise operands.error(f"barrier {number}: only barrier 0, of the whole block, is known")
    return f"ptx::barrier({operands.line});"


def _copy(operands: Operands, match: re.Match[str], shared: str, source: str, num_bytes: str, num_read: str) -> str:
    if num_bytes != "16":
        raise operands.error(f"cp.async.cg of {num_bytes} bytes: it copies 16")
    places = operands.address(shared, "shared"), operands.address(source, "global")
    return f"ptx::cp_async_cg({', '.join(places)}, {operands.source(num_read, 'u32')}, {operands.line});"


def _commit(operands: Operands, match: re.Match[str]) -> str:
    return "ptx::cp_async_commit_group();"


def _wait(operands: Operands, match: re.Match[str], pending: str) -> str:
    if not pending.isdecimal():
        raise operands.error(f"{match[0]} {pending}")
    return f"ptx::cp_async_wait_group({pending});"


def _ldmatrix(operands: Operands, match: re.Match[str], registers: str, address: str) -> str:
    transposed = "true" if match[1] else "false"
    call = f"ptx::ldmatrix_x4<{transposed}>({operands.address(address, 'shared')}, {operands.line})"
    return _spread(operands, "b32", operands.vector(registers, 4), call)


def _mma(operands: Operands, match: re.Match[str], target: str, a: str, b: str, c: str) -> str:
    fragments = [
        "{" + ", ".join(operands.source(part, kind) for part in operands.vector(vector, count)) + "}"
        for vector, kind, count in ((a, "b32", 4), (b, "b32", 2), (c, "f32", 4))
    ]
    call = f"ptx::mma_m16n8k16<ptx::from_{match[1]}>({', '.join(fragments)}, {operands.line})"
    return _spread(operands, "f32", operands.vector(target, 4), call)


_OPERATIONS: tuple[tuple[str, int, Callable[..., str]], ...] = (
    (r"mov\.(pred|[bsu](?:16|32|64)|f32)", 2, _mov),
    (r"ld\.param\.([bsu](?:32|64))", 2, _load_parameter),
    (r"ld\.(global|shared)(?:\.v([24]))?\.([busf]\d+)", 2, _load),
    (r"st\.(global|shared)(?:\.v([24]))?\.([busf]\d+)", 2, _store),
    (r"bra(?:\.uni)?", 1, _branch),
    (r"ret", 0, _return),
    (r"trap", 0, _trap),
    (r"bar\.sync", 1, _barrier),
    (r"cp\.async\.cg\.shared\.global", 4, _copy),
    (r"cp\.async\.commit_group", 0, _commit),
    (r"cp\.async\.wait_group", 1, _wait),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16", 2, _ldmatrix),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32", 4, _mma),
)
"""By opcode: how many operands it has, and what makes C++ of them."""
