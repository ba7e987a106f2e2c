"""Writing safetensors: tensor after tensor, piece after piece, hashed on the way and read back at the end."""

from __future__ import annotations

import json
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import xxhash

from llava_ds.checkpoint.layout import FileRecord, hash_file
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.tensor_files import DTYPE_NAMES
from llava_ds.errors import CheckpointError

_STRETCH_BYTES = 1 << 26
"""What is read back at a time."""
_READ_BYTES = 1 << 22

Progress = Callable[[int], None]
"""Is told how many more bytes of tensors are done."""


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, LazyTensor]], progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None, verify: bool = False,
) -> FileRecord:
    """Writes a safetensors file, no more than a piece of a tensor in memory; on return it is on disk.

    ``verify`` reads it back behind the writing, from the disk where the system lets go of its cache.

    Raises CheckpointError that names the file when it cannot be written whole, or does not hold what was written.
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
    begin = struct.pack("<Q", len(text)) + text
    digest = xxhash.xxh3_128(begin)
    size = len(begin) + offset
    try:
        with path.open("wb", buffering=0) as file, ExitStack() as stack:
            reader = stack.enter_context(_ReadBehind(path, file.fileno())) if verify else None
            _write_all(file.fileno(), memoryview(begin))
            position = len(begin)
            for block in (block for _, tensor in tensors for block in _blocks(tensor)):
                digest.update(block)
                _write_all(file.fileno(), block)
                position += len(block)
                if reader:
                    reader.follow(position)
                if progress:
                    progress(len(block))
            os.fsync(file.fileno())
            found = reader.finish(size) if reader else digest.hexdigest()
    except OSError as error:
        written = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path}: {error.strerror or error} after {written} of {size} bytes.\n"
            "  Make room, or choose a folder that can be written, and start again; earlier checkpoints are untouched."
        ) from error
    _compare(path, digest.hexdigest(), found)
    return FileRecord(size, digest.hexdigest())


def _blocks(tensor: LazyTensor) -> Iterator[memoryview]:
    for piece in tensor.pieces():
        yield piece.contiguous().view(torch.uint8).numpy().data


def _write_all(handle: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += os.write(handle, block[done:])


class _ReadBehind:
    """Hashes a file behind the one that writes it: brings a stretch to the disk, has the system forget it, reads it."""

    def __init__(self, path: Path, written: int) -> None:
        self._path, self._written = path, written
        self._digest = xxhash.xxh3_128()
        self._ends: queue.Queue[int | None] = queue.Queue(1)  # the writer waits where the disk is slower
        self._asked = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _ReadBehind:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._ends.put(None)
            self._thread.join()

    def follow(self, position: int) -> None:
        """The file is written up to ``position``."""
        if position - self._asked >= _STRETCH_BYTES:
            self._ends.put(position)
            self._asked = position

    def finish(self, size: int) -> str:
        """The hash of the whole file as it was read. Raises OSError when it could not be read."""
        self._ends.put(size)
        self._ends.put(None)
        self._thread.join()
        if self._error:
            raise self._error
        return self._digest.hexdigest()

    def _run(self) -> None:
        buffer, position = memoryview(bytearray(_READ_BYTES)), 0
        while (end := self._ends.get()) is not None:
            if self._error:
                continue  # the writer must not wait for ever
            try:
                os.fdatasync(self._written)
                with self._path.open("rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), position, end - position, os.POSIX_FADV_DONTNEED)
                    file.seek(position)
                    while position < end and (size := file.readinto(buffer[: end - position])):
                        self._digest.update(buffer[:size])
                        position += size
            except Exception as error:  # of a thread it would be lost
                self._error = error


def write_sharded(
    folder: Path, tensors: Sequence[tuple[str, LazyTensor]], max_shard_bytes: int, progress: Progress | None = None
) -> dict[str, FileRecord]:
    """Writes ``model.safetensors``, or where that is larger than ``max_shard_bytes`` several with an index.

    The names are those of transformers. What is written is read back. Returns the records of the files with tensors.
    """
    shards = split_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": write_safetensors(folder / "model.safetensors", shards[0], progress, verify=True)}
    records: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_safetensors(folder / name, shard, progress, verify=True)
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
        _compare(file, record.xxh128, hash_file(file, progress))


def _compare(file: Path, written: str, found: str) -> None:
    if found != written:
        raise CheckpointError(
            f"{file}: xxh128 {written[:16]} was written, {found[:16]} is read back; the disk is not to be trusted: "
            "choose another folder"
        )
