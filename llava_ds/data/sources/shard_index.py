"""Where the members of a tar shard lie: from the index beside it, or from its headers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_ds.cache import cache_folder
from llava_ds.data.sources.shard_files import ShardFile, read_small_file
from llava_ds.errors import DataError

INDEX_SUFFIX = ".index.json"
_MAX_TAIL_BYTES = 2**20  # of zeros behind the last member; tar writes 1 to 10 KiB


class Member(NamedTuple):
    """A file in a tar: ``size`` bytes from ``offset``; its header is the block before."""

    name: str
    offset: int
    size: int


def load_index(file: ShardFile) -> list[Member]:
    """The members of a shard, from ``SHARD.tar.index.json``, or from a scan that the cache folder remembers.

    Raises DataError for an index that does not fit the tar, and for a tar that is cut off, damaged or compressed.
    """
    beside = read_small_file(file.url + INDEX_SUFFIX)
    if beside is not None:
        return _parse_index(beside, file, file.url + INDEX_SUFFIX)
    key = hashlib.sha256(f"{file.url}|{file.size_bytes}|{file.version}".encode()).hexdigest()[:16]
    cached = cache_folder() / "shards" / f"{file.name}.{key}{INDEX_SUFFIX}"
    if cached.is_file():
        try:
            return _parse_index(cached.read_bytes(), file, str(cached))
        except (DataError, OSError):
            pass  # what cannot be read is made again, here below
    members = scan_tar(file)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_index(cached, file.size_bytes, members)
    except OSError as error:
        why = f"{cached} cannot be written ({error.strerror})"
        print(f"{file.url}: scanned; no index is kept, as {why}", file=sys.stderr)
    return members


def write_index(path: Path, tar_bytes: int, members: Sequence[Member]) -> None:
    """Writes an index; ``path`` holds it whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("w") as file:
        json.dump({"tar_bytes": tar_bytes, "members": members}, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def scan_tar(file: ShardFile) -> list[Member]:
    """The regular files of a tar by its headers; contents are jumped over. Raises DataError as ``load_index``."""
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
            end = tar.offset
    except DataError:
        raise
    except Exception as error:  # fsspec's back ends and damaged headers raise whatever they ran into
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    # tarfile takes a damaged or missing header for the end, and would give only the members before it.
    tail = file.read(end, max(end, min(file.size_bytes, end + _MAX_TAIL_BYTES)))
    if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):
        raise _damaged(
            file, f"after {len(members)} members, byte {end} of {file.size_bytes} is no end with nothing behind it"
        )
    return members


def _damaged(file: ShardFile, how: str) -> DataError:
    return DataError(
        f"{file.url}: not a whole tar: {how}.\n  Copy or write the shard again; a compressed one must be unpacked."
    )


def _parse_index(content: bytes, file: ShardFile, where: str) -> list[Member]:
    advice = "delete the index, or copy shard and index again from one place"
    try:
        index: dict[str, Any] = json.loads(content)
        tar_bytes = index["tar_bytes"]
        members = [Member(str(name), int(offset), int(size)) for name, offset, size in index["members"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: a damaged index ({error!r:.200}); {advice}") from error
    if tar_bytes != file.size_bytes:
        raise DataError(
            f"{where}: made for a tar of {tar_bytes!r} bytes, but {file.url} has {file.size_bytes}; {advice}"
        )
    for member in members:
        if member.offset < tarfile.BLOCKSIZE or member.size < 0 or member.offset + member.size > tar_bytes:
            raise DataError(
                f"{where}: {member.name!r} at bytes {member.offset} to {member.offset + member.size} is not inside "
                f"the tar of {tar_bytes} bytes; {advice}"
            )
    return members
