"""What a run starts from (``model.init_from``): the projector and the LLM of any layout, recorded by file and hash."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from llava_ds.checkpoint.formats.original import read_original_weights
from llava_ds.checkpoint.formats.projector_file import read_projector_file
from llava_ds.checkpoint.formats.transformers import read_transformers_weights
from llava_ds.checkpoint.fragments import STEP_FILE, open_weights
from llava_ds.checkpoint.keymap import PROJECTOR, add_prefix
from llava_ds.checkpoint.layout import read_manifest, read_run, resolve_step
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.recognise import MERGED_FILE, find_projector_file, recognise_layout
from llava_ds.checkpoint.sources import check_files, describe_files
from llava_ds.checkpoint.tensor_files import find_weight_files
from llava_ds.errors import CheckpointError

_MOST_LINES = 20


@dataclass(frozen=True)
class InitialWeights:
    """Weights by our names, never the tower's, and what run.json says of where they are from.

    ``record`` is plain data: ``sources`` (each with ``path``, ``layout`` and ``xxh128`` by file) and ``weights`` (by
    name, the number of the source that holds it).
    """

    weights: dict[str, LazyTensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=lambda: {"sources": [], "weights": {}})


def open_initial(path: Path, fresh: bool = True) -> InitialWeights:
    """The weights that a run can start from at ``path``, in whichever layout they are.

    Of a run: what it trained, and for the rest what it started from itself. ``fresh=False`` believes hashes that were
    taken before of unchanged files.

    Raises CheckpointError when it is none of the layouts (which it lists), or is damaged, or has changed.
    """
    layout = recognise_layout(path)
    if layout == "llava_ds":
        return _open_run(resolve_step(path).resolve(), fresh)
    path = path.resolve()
    source = {"path": str(path), "layout": layout, "xxh128": describe_files(_files_of(path, layout))}
    weights = _OPENERS[layout](path)
    return InitialWeights(weights, {"sources": [source], "weights": dict.fromkeys(weights, 0)})


def reopen_initial(
    record: Mapping[str, Any], step: Path, needed: Collection[str], fresh: bool = False
) -> dict[str, LazyTensor]:
    """Those of the weights that a run started from which are ``needed``; what holds none of them may be gone.

    ``record`` is what run.json of ``step`` has as ``initial_weights``.

    Raises CheckpointError that lists every file which is gone, or not the one that the run started from.
    """
    wanted = {name: number for name, number in record["weights"].items() if name in needed}
    sources = {number: record["sources"][number] for number in sorted(set(wanted.values()))}
    expected = {file: xxh128 for source in sources.values() for file, xxh128 in source["xxh128"].items()}
    try:
        check_files(expected, fresh)
    except CheckpointError as error:
        raise CheckpointError(f"{step} started from weights that it still needs.\n{error}") from error
    opened = {number: _OPENERS[source["layout"]](Path(source["path"])) for number, source in sources.items()}
    lost = sorted(name for name, number in wanted.items() if name not in opened[number])
    if lost:
        raise CheckpointError(f"{step}: {', '.join(lost)} is not where run.json says; it was changed by hand")
    return {name: opened[number][name] for name, number in wanted.items()}


def apply_weights(
    model: nn.Module, weights: Mapping[str, LazyTensor], copy: Callable[[nn.Parameter, LazyTensor], None]
) -> list[str]:
    """Copies weights into a model, one at a time, with ``copy`` (which knows which ranks have to read them).

    A table of words with more rows than the model's loses its last ones, which layouts of others add for ``<image>``
    and for padding; returns a line about each.

    Raises CheckpointError that lists every unknown name and every differing shape.
    """
    parameters = dict(model.named_parameters())
    tables = {id(parameter) for parameter in _word_tables(model)}
    problems, notes, fitting = [], [], {}
    for name, tensor in weights.items():
        if name not in parameters:
            problems.append(f"{name}: the model has no such parameter")
            continue
        shape = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        fitting[name] = fit_rows(tensor, shape) if id(parameters[name]) in tables else tensor
        if fitting[name].shape != shape:
            problems.append(f"{name}: {tensor.shape} in {tensor.origin}, {shape} in the model")
        elif tensor.shape != shape:
            notes.append(f"{name}: {tensor.shape[0]} words in {tensor.origin}, the model has the first {shape[0]}")
    if problems:
        more = f"\n  and {len(problems) - _MOST_LINES} more" if len(problems) > _MOST_LINES else ""
        raise CheckpointError(
            "the weights do not fit the model; use the model settings of the run that they are from:\n  "
            + "\n  ".join(problems[:_MOST_LINES]) + more
        )
    for name, tensor in fitting.items():
        copy(parameters[name], tensor)
    return notes


def fit_rows(table: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A table of words without its last rows, where it has more than ``shape`` and is like it otherwise."""
    if table.shape[1:] == shape[1:] and table.shape[0] > shape[0]:
        return table.rows(0, shape[0])
    return table


def _word_tables(model: nn.Module) -> list[nn.Parameter]:
    llm: Any = getattr(model, "llm", None)
    if llm is None:
        return []
    modules = (llm.get_input_embeddings(), llm.get_output_embeddings())
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _open_run(step: Path, fresh: bool) -> InitialWeights:
    expected = {str(step / name): record.xxh128 for name, record in read_manifest(step).items() if _is_read(name)}
    check_files(expected, fresh)
    weights = open_weights(step)
    sources = [{"path": str(step), "layout": "llava_ds", "xxh128": expected}]
    numbers = dict.fromkeys(weights, 0)
    record = read_run(step)["initial_weights"]
    inherited = [name for name in record["weights"] if name not in weights]
    weights |= reopen_initial(record, step, inherited, fresh)
    moved: dict[int, int] = {}  # a source's number in the record -> here
    for name in inherited:
        old = record["weights"][name]
        if old not in moved:
            moved[old] = len(sources)
            sources.append(record["sources"][old])
        numbers[name] = moved[old]
    return InitialWeights(weights, {"sources": sources, "weights": numbers})


def _is_read(name: str) -> bool:
    return name == STEP_FILE or name.startswith("weights-")


def _files_of(path: Path, layout: str) -> list[Path]:
    if layout == "projector":
        return [find_projector_file(path)]
    settings = [path / name for name in ("config.json", MERGED_FILE) if (path / name).is_file()]
    return [*settings, *find_weight_files(path)]


def _open_projector(path: Path) -> dict[str, LazyTensor]:
    return add_prefix(read_projector_file(find_projector_file(path)), PROJECTOR)


_OPENERS: dict[str, Callable[[Path], dict[str, LazyTensor]]] = {
    "llava_ds": open_weights,
    "transformers": read_transformers_weights,
    "original": read_original_weights,
    "projector": _open_projector,
}
