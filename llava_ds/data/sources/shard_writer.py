"""Writes a source as tar shards that llava_ds and webdataset read; the bytes depend on the samples alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import PIL.Image

import llava_ds
from llava_ds.data.sources.shard_files import COMPLETE_FILE, UNFINISHED_FILE
from llava_ds.data.sources.shard_index import INDEX_SUFFIX, Member, write_index
from llava_ds.data.sources.shards import IMAGE_EXTENSIONS
from llava_ds.data.sources.source import Source
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Image, Sample

Files = list[tuple[str, bytes]]
_SPEAKERS = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class WrittenShard:
    """One shard as ``shards.json`` lists it."""

    name: str
    num_samples: int
    num_images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """What ``shards.json`` says."""

    llava_ds: str
    source: str
    num_samples: int
    num_images: int
    bytes: int
    skipped: dict[str, int]
    shards: list[WrittenShard]


def write_shards(
    source: Source,
    out: Path,
    samples_per_shard: int = 10_000,
    max_shard_bytes: int = 2**30,
    on_bad_sample: str = "error",
    track: Callable[[Iterable[int]], Iterable[int]] = lambda numbers: numbers,
) -> Written:
    """Writes ``train-000000.tar``, ... with their indexes into the new folder ``out``, and ``shards.json`` last.

    A shard is closed at ``samples_per_shard``, or before it would be larger than ``max_shard_bytes`` (a larger sample
    gets one of its own). Images are copied byte for byte. ``track`` wraps the record numbers, for a
    progress bar.

    Raises ConfigError when ``out`` is not empty, DataError for a bad record or image unless ``on_bad_sample`` is
    ``skip``, and when no sample is left.
    """
    _begin(out)
    skipped: Counter[str] = Counter()
    shards: list[WrittenShard] = []
    shard: _Shard | None = None
    for number in track(range(len(source))):
        try:
            files = _sample_files(source[number], f"{number:09d}")
        except DataError as error:
            if on_bad_sample != "skip":
                raise
            skipped[error.reason] += 1
            continue
        if shard and (shard.num_samples >= samples_per_shard or shard.bytes_with(files) > max_shard_bytes):
            shards.append(shard.close())
            shard = None
        shard = shard or _Shard(out / f"train-{len(shards):06d}.tar")
        shard.add(files)
    if shard is None:
        raise DataError(f"{source.name}: no sample to write; {skipped.total()} were skipped: {dict(skipped)}")
    shards.append(shard.close())
    totals = (sum(s.num_samples for s in shards), sum(s.num_images for s in shards), sum(s.bytes for s in shards))
    written = Written(llava_ds.__version__, source.name, *totals, dict(sorted(skipped.items())), shards)
    _finish(out, written)
    return written


class _Shard:
    """A tar under a temporary name until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        self._members: list[Member] = []
        self._file = _HashedFile(path.with_name(path.name + ".tmp").open("wb"))
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]

    def bytes_with(self, files: Files) -> int:
        """Size of the closed tar if ``files`` were added."""
        blocks = sum(2 + (len(content) - 1) // tarfile.BLOCKSIZE for _, content in files)
        end = self._file.tell() + (blocks + 2) * tarfile.BLOCKSIZE
        return -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def add(self, files: Files) -> None:
        """Appends the members of one sample, record first. What differs between machines is the same in all headers."""
        self.num_samples += 1
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            self._members.append(Member(name, self._file.tell() + tarfile.BLOCKSIZE, len(content)))
            self._tar.addfile(header, io.BytesIO(content))

    def close(self) -> WrittenShard:
        """Ends the tar, writes its index, and gives it its name."""
        self._tar.close()
        size = self._file.tell()
        self._file.close()
        write_index(self.path.with_name(self.path.name + INDEX_SUFFIX), size, self._members)
        self.path.with_name(self.path.name + ".tmp").replace(self.path)
        num_images = len(self._members) - self.num_samples
        return WrittenShard(self.path.name, self.num_samples, num_images, size, self._file.digest.hexdigest())


class _HashedFile:
    """What tarfile needs of a file to write, with the hash of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _sample_files(sample: Sample, key: str) -> Files:
    images: Files = []
    for number, image in enumerate(sample.images):
        content = _image_bytes(image, sample)
        stem = key if len(sample.images) == 1 else f"{key}.{number}"
        images.append((f"{stem}.{_extension(content, image, sample)}", content))
    names = [name for name, _ in images]
    record = {
        "id": sample.id,
        **({"image": names[0] if len(names) == 1 else names} if names else {}),
        "conversations": [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in sample.turns],
    }
    return [(f"{key}.json", json.dumps(record).encode()), *images]


def _image_bytes(image: Image, sample: Sample) -> bytes:
    if not isinstance(image, str):
        return image.read()
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise DataError(
            f"{sample.where()}: image {image!r} cannot be read ({error}); fix the path, or the image root before it",
            reason="image file is missing",
        ) from error


def _extension(content: bytes, image: Image, sample: Sample) -> str:
    """By what the bytes are, not by what the file was called. Only the header is read."""
    name = image if isinstance(image, str) else image.name
    try:
        with PIL.Image.open(io.BytesIO(content)) as picture:
            kind = str(picture.format).lower()
    except Exception as error:  # PIL's plugins raise whatever their parsing ran into
        raise DataError(
            f"{sample.where()}: image {name} does not decode: {type(error).__name__}; replace it or drop the record",
            reason="image does not decode",
        ) from error
    extension = {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(
            f"{sample.where()}: image {name} is {kind}; shards hold {', '.join(IMAGE_EXTENSIONS)}; convert it",
            reason="image of a format that shards do not hold",
        )
    return extension


def _begin(out: Path) -> None:
    if (out / UNFINISHED_FILE).exists():
        raise ConfigError(f"{out}: an earlier run was stopped here and left it unfinished; delete the folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: not an empty folder; give a new one")
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED_FILE).touch(exist_ok=False)


def _finish(out: Path, written: Written) -> None:
    unfinished = out / UNFINISHED_FILE
    with unfinished.open("w") as file:
        json.dump(asdict(written), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(out / COMPLETE_FILE)
