"""Weights in files that others wrote: safetensors or PyTorch's, one file or several with an index.

Nothing in them is executed: PyTorch's files are read with ``weights_only``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_ds.checkpoint.layout import reading
from llava_ds.checkpoint.lazy import LazyTensor, in_memory
from llava_ds.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What a safetensors header calls a dtype."""

_STEMS = ("model.safetensors", "pytorch_model.bin")


def find_weight_files(folder: Path) -> list[Path]:
    """The files that hold a model folder's weights, as transformers names them; safetensors first.

    Raises CheckpointError when there are none, or an index names one that is missing.
    """
    for stem in _STEMS:
        index = folder / f"{stem}.index.json"
        if index.is_file():
            with reading(index):
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{index} names {', '.join(missing)}, which is missing; copy the folder again")
            return [folder / name for name in names]
        if (folder / stem).is_file():
            return [folder / stem]
    raise CheckpointError(f"{folder} holds no weights (none of {', '.join(_STEMS)}, nor an index of them)")


def open_tensors(files: Sequence[Path]) -> dict[str, LazyTensor]:
    """Every tensor of the files, by name. Raises CheckpointError for a damaged file, or a name that stands twice."""
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        opened = open_safetensors(file) if file.suffix == ".safetensors" else _open_pytorch(file)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            raise CheckpointError(f"{file}: {twice[0]} stands in {tensors[twice[0]].origin}, too; remove one of them")
        tensors |= opened
    return tensors


def open_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, read through the page cache when asked for.

    Raises CheckpointError when the header is broken, or the file is not as long as it says.
    """
    header, begin = read_safetensors_header(file)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: {name} is of the type {entry['dtype']}, which is not known here")
        dtype = _DTYPES[entry["dtype"]]
        tensors[name] = _on_disk(file, begin + start, stop - start, dtype, tuple(entry["shape"]))
    return tensors


def read_safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin.

    Raises CheckpointError when it is broken, or the file is not as long as it says.
    """
    with reading(file), file.open("rb") as handle:
        size = file.stat().st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{size} bytes are not a whole safetensors file")
        header = json.loads(handle.read(length))
        data = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        if size != 8 + length + data:
            raise ValueError(f"it has {size} bytes, and its header says {8 + length + data}")
    return header, 8 + length


def _on_disk(file: Path, begin: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> LazyTensor:
    def read(start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return torch.empty(0, dtype=dtype)
        # Bytes into a buffer of our own: a map of the file would kill the process if the file were cut.
        with reading(file), file.open("rb") as handle:
            handle.seek(begin + start * dtype.itemsize)
            raw = np.fromfile(handle, np.uint8, (stop - start) * dtype.itemsize)
            if len(raw) != (stop - start) * dtype.itemsize:
                raise ValueError(f"it ends before byte {begin + stop * dtype.itemsize}")
        return torch.from_numpy(raw).view(dtype)

    if num_bytes != torch.Size(shape).numel() * dtype.itemsize:
        raise CheckpointError(f"{file}: {num_bytes} bytes for a tensor of {shape} {dtype}; the file is damaged")
    return LazyTensor(dtype, shape, read, str(file))


def _open_pytorch(file: Path) -> dict[str, LazyTensor]:
    try:
        # Files of before 2020 are no archives and cannot be mapped: those are read whole.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_archive(file))
    # A file that is no pickle at all fails in whichever way its first bytes make it.
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {type(error).__name__}: {error}\n"
            "  Give a file of tensors alone; nothing else in it is ever executed."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file} does not hold a mapping of names to tensors; give a file of weights")
    return {str(name): in_memory(value, str(file)) for name, value in state.items()}


def _is_archive(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"
