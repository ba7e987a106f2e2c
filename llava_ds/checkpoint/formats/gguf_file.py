"""A GGUF file, written a piece of a tensor at a time. The one import site of gguf."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from llava_ds.checkpoint.layout import FileRecord
from llava_ds.checkpoint.writer import Progress
from llava_ds.errors import CheckpointError

_TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file; ``pieces`` gives its flattened content in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]


def import_gguf() -> Any:
    """The package gguf. Raises CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("GGUF is written with the package gguf; install llava_ds[gguf]") from error
    return gguf


def write_file(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor],
    progress: Progress | None,
) -> FileRecord:
    """Writes a file; on return it is on disk.

    Raises CheckpointError when it cannot be written, or a value does not fit into fp16.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, entry in metadata.items():
        _add(writer, key, entry)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        num_bytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        kind = gguf.GGMLQuantizationType[_TENSOR_TYPES[tensor.dtype]]
        # raw_dtype is the one that counts: numpy has no bf16.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digest = xxhash.xxh3_128(path.read_bytes())
        with path.open("ab", buffering=0) as file:
            _append(file, digest, bytes(-file.tell() % writer.data_alignment))
            for name, tensor in tensors.items():
                for piece in tensor.pieces():
                    num_bytes = _append(file, digest, _as_bytes(name, piece.to(tensor.dtype)))
                    if progress:
                        progress(num_bytes)
                _append(file, digest, bytes(-file.tell() % writer.data_alignment))
            os.fsync(file.fileno())
            return FileRecord(file.tell(), digest.hexdigest())
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}. Make room, or choose a folder that can be written, and start again."
        ) from error
    finally:
        with suppress(OSError):  # of an error that is told already
            writer.close()


def check_file(path: Path, tensors: Mapping[str, GgufTensor]) -> None:
    """Reads a file through the package gguf and compares every tensor, bit for bit, a piece at a time.

    Raises CheckpointError that names those which differ, are missing or were not asked for.
    """
    found = {tensor.name: tensor for tensor in import_gguf().GGUFReader(path).tensors}
    wrong = sorted(found.keys() ^ tensors.keys())
    for name in sorted(found.keys() & tensors.keys()):
        raw, position = np.asarray(found[name].data).reshape(-1).view(np.uint8), 0
        for piece in tensors[name].pieces():
            block = np.frombuffer(_as_bytes(name, piece.to(tensors[name].dtype)), np.uint8)
            if not np.array_equal(raw[position : position + len(block)], block):
                wrong.append(name)
                break
            position += len(block)
        if tuple(map(int, reversed(found[name].shape))) != tensors[name].shape or position != len(raw):
            wrong.append(name)
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise CheckpointError(f"{path}: {names} are not read back as they were written; choose another folder")


def _as_bytes(name: str, piece: torch.Tensor) -> memoryview:
    if piece.dtype == torch.float16 and piece.isinf().any():
        raise CheckpointError(f"{name} has values that fp16 does not hold; write bf16 or f32 (file_type)")
    return memoryview(piece.contiguous().view(torch.uint8).numpy().data).cast("B")


def _append(file: FileIO, digest: xxhash.xxh3_128, block: memoryview | bytes) -> int:
    digest.update(block)
    done = 0
    while done < len(block):
        done += file.write(block[done:])
    return done


def _add(writer: Any, key: str, entry: Any) -> None:
    if isinstance(entry, bool):
        writer.add_bool(key, entry)
    elif isinstance(entry, int):
        writer.add_uint32(key, entry)
    elif isinstance(entry, float):
        writer.add_float32(key, entry)
    elif isinstance(entry, str):
        writer.add_string(key, entry)
    else:
        writer.add_array(key, entry)
