"""Writing safetensors: tensor after tensor, piece after piece, hashed on the way and read back at the end."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from llava_ds.checkpoint.layout import FileRecord, hash_file
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.tensor_files import DTYPE_NAMES
from llava_ds.errors import CheckpointError

Progress = Callable[[int], None]
"""Is told how many more bytes of tensors are done."""


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, LazyTensor]], progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Writes a safetensors file, no more than a piece of a tensor in memory; on return it is on disk.

    Raises CheckpointError that names the file when it cannot be written whole.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 8 + len(text) + offset
    try:
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            header_block = struct.pack("<Q", len(text)) + text
            digest.update(header_block)
            _write_all(file.fileno(), memoryview(header_block))
            for block in (block for _, tensor in tensors for block in _blocks(tensor)):
                hashed = pool.submit(digest.update, block)  # both let go of Python's lock: a second core hashes
                _write_all(file.fileno(), block)
                hashed.result()
                if progress:
                    progress(len(block))
            os.fsync(file.fileno())
    except OSError as error:
        written = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path}: {error.strerror or error} after {written} of {size} bytes.\n"
            "  Make room, or choose a folder that can be written, and start again; earlier checkpoints are untouched."
        ) from error
    return FileRecord(size, digest.hexdigest())


def _blocks(tensor: LazyTensor) -> Iterator[memoryview]:
    for piece in tensor.pieces():
        yield piece.contiguous().view(torch.uint8).numpy().data


def _write_all(handle: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += os.write(handle, block[done:])


def write_sharded(
    folder: Path, tensors: Sequence[tuple[str, LazyTensor]], max_shard_bytes: int, progress: Progress | None = None
) -> dict[str, FileRecord]:
    """Writes ``model.safetensors``, or where that is larger than ``max_shard_bytes`` several with an index.

    The names are those of transformers. Returns the records of the files with tensors.
    """
    shards = split_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": write_safetensors(folder / "model.safetensors", shards[0], progress)}
    records: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_safetensors(folder / name, shard, progress)
        weight_map |= {key: name for key, _ in shard}
    index = {"metadata": {"total_size": sum(t.num_bytes for _, t in tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return records


def split_shards(
    tensors: Sequence[tuple[str, LazyTensor]], max_shard_bytes: int
) -> list[list[tuple[str, LazyTensor]]]:
    """The tensors in their order, in runs of at most ``max_shard_bytes`` (or of one larger tensor)."""
    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += tensor.num_bytes
    return shards


def read_back(folder: Path, records: Mapping[str, FileRecord], progress: Progress | None = None) -> None:
    """Reads written files again, from the disk where the system lets go of its cache, and compares.

    Raises CheckpointError for a file that does not hold what was written.
    """
    for name, record in records.items():
        file = folder / name
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        found = hash_file(file, progress)
        if found != record.sha256:
            raise CheckpointError(
                f"{file}: sha256 {record.sha256[:16]} was written, {found[:16]} is read back; the disk is not to be "
                "trusted: choose another folder"
            )
