"""Tar shards in webdataset's layout: the members of one sample have the same name up to the first dot.

``KEY.json`` (a LLaVA record) with its images ``KEY.jpg``, or ``KEY.0.jpg``, ``KEY.1.png``, ...; or a pair ``KEY.txt``
(the caption) and ``KEY.jpg``, where a ``KEY.json`` without conversations is a note about the pair.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_ds.data.sources.captions import caption_sample
from llava_ds.data.sources.llava_json import parse_record
from llava_ds.data.sources.shard_files import ShardFile, find_shards
from llava_ds.data.sources.shard_index import Member, load_index
from llava_ds.errors import DataError
from llava_ds.schema import Image, Sample, StoredImage

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm")
"""By these a member is known as an image."""

_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")
_NAME = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardSource:
    """The samples of all shards, in their order.

    ``samples`` holds, for each shard and sample, its members as JSON text: a fraction of what objects would take.
    """

    name: str
    fingerprint: str
    files: tuple[ShardFile, ...]
    samples: tuple[tuple[str, ...], ...]
    ends: np.ndarray
    seed: int

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError that names shard and key when the record is bad or not whole."""
        number = range(len(self))[index]
        shard = int(np.searchsorted(self.ends, number, side="right"))
        row = number - (int(self.ends[shard - 1]) if shard else 0)
        members = [Member(*fields) for fields in json.loads(self.samples[shard][row])]
        return _sample(_entry(self.files[shard], members), self.seed)


def open_shards(spec: str, seed: int = 0) -> ShardSource:
    """The samples of ``spec``: a folder, one .tar, a pattern ``train-{000000..000009}.tar``, or an fsspec URL of these.

    Members are found by the indexes of tools/make_shards, or by a scan of the headers that the cache folder remembers;
    each read is one range of bytes. ``seed`` draws the questions of captions. Members that belong to no sample in this
    layout (other extensions, names without one, ``__meta__``) are left aside, as webdataset does.

    Raises DataError for a missing, damaged or unfinished shard, ConfigError for a wrong pattern,
    BackendUnavailableError when a URL needs a package that is not here.
    """
    files = tuple(find_shards(spec))
    samples = tuple(tuple(_group(load_index(file))) for file in files)
    ends = np.cumsum([len(shard) for shard in samples])
    if not ends[-1]:
        raise DataError(f"{spec}: no member KEY.json, KEY.txt or KEY.jpg in {len(files)} shard(s); give others")
    digest = hashlib.sha256(str(seed).encode())
    for file in files:
        digest.update(f"\n{file.url}|{file.size_bytes}|{file.version}".encode())
    return ShardSource(spec, digest.hexdigest(), files, samples, ends, seed)


def _group(members: Iterable[Member]) -> list[str]:
    groups: dict[str, list[Member]] = {}
    aside = []
    for member in members:
        key, extension = _split(member.name)
        if extension in ("json", "txt") or _IMAGE.fullmatch(extension):
            groups.setdefault(key, []).append(member)
        elif _IMAGE.fullmatch(last := extension.rpartition(".")[2]) or last in ("json", "txt"):
            aside.append(member.name)
    if aside:
        print(
            f"left aside {len(aside)} member(s) of a shard, the first {aside[0]!r}: in the webdataset layout, what "
            "follows the first dot of a name is its extension, and this one is none of json, txt or a picture's",
            file=sys.stderr,
        )
    return [json.dumps(group) for group in groups.values()]


def _split(name: str) -> tuple[str, str]:
    """Key and extension as webdataset takes them; both empty where it takes none."""
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return "", ""
    return match.group(1), match.group(2).lower()


@dataclass(frozen=True)
class _Entry:
    """The members of one sample, by extension."""

    file: ShardFile
    key: str
    parts: dict[str, Member]

    @property
    def origin(self) -> str:
        return f"{self.file.name}:{self.key}"

    @property
    def names(self) -> str:
        return ", ".join(member.name for member in self.parts.values())

    def text(self, extension: str) -> str:
        content = _read_member(self.file, self.parts[extension], self.origin)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.origin}: not UTF-8 text ({error}); repair the record", "not UTF-8 text") from error

    def record(self) -> Any:
        text = self.text("json")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.origin}: not valid JSON: {error}; repair the record", "not valid JSON") from error

    def images(self) -> tuple[Image, ...]:
        found: dict[int, Image] = {}
        num_images = 0
        for extension, member in self.parts.items():
            match = _IMAGE.fullmatch(extension)
            if match:
                read = partial(_read_member, self.file, member, self.origin)
                found[int(match.group(1) or 0)] = StoredImage(f"{self.file.url}/{member.name}", read)
                num_images += 1
        if sorted(found) != list(range(num_images)):
            raise DataError(
                f"{self.origin}: holds {self.names}; images must be KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ... without gap",
                reason="images are not numbered 0, 1, ...",
            )
        return tuple(found[number] for number in range(num_images))


def _entry(file: ShardFile, members: Sequence[Member]) -> _Entry:
    key, _ = _split(members[0].name)
    parts = {_split(member.name)[1]: member for member in members}
    if len(parts) != len(members):
        raise DataError(
            f"{file.name}:{key}: a member stands twice: {', '.join(m.name for m in members)}; "
            "keys must be unique in a shard",
            reason="a member stands twice",
        )
    return _Entry(file, key, parts)


def _sample(entry: _Entry, seed: int) -> Sample:
    images = entry.images()
    record = entry.record() if "json" in entry.parts else {}
    if isinstance(record, dict) and "conversations" not in record:
        return _caption(entry, record, images, seed)
    sample = parse_record({"id": entry.key} | record if isinstance(record, dict) else record, entry.origin, Path())
    if sample.images and len(sample.images) != len(images):
        raise DataError(
            f"{sample.where()}: the record names {len(sample.images)} image(s), the shard holds {len(images)} of them "
            f"({entry.names}); write the shard again",
            reason="a record without its images",
        )
    return replace(sample, images=images)


def _caption(entry: _Entry, note: dict[str, Any], images: tuple[Image, ...], seed: int) -> Sample:
    if not {"txt", "json"} & set(entry.parts):
        raise DataError(
            f"{entry.origin}: an image without its record ({entry.names}); add {entry.key}.json or {entry.key}.txt",
            reason="an image without its record",
        )
    if len(images) != 1:
        raise DataError(
            f"{entry.origin}: a pair needs one image, the shard holds {len(images)}", reason="a pair without one image"
        )
    caption = note["caption"] if note.get("caption") is not None else note.get("text")
    if "txt" in entry.parts:
        caption = entry.text("txt")
    return caption_sample(entry.key, images[0], caption, entry.origin, seed)


def _read_member(file: ShardFile, member: Member, origin: str) -> bytes:
    """The content, in one read with the header before it, which tells whether the index still fits the tar."""
    content = file.read(member.offset - tarfile.BLOCKSIZE, member.offset + member.size)
    try:
        header = tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _misplaced(file, member, origin, f"no header there ({error})") from error
    if header.size != member.size:
        raise _misplaced(file, member, origin, f"its header says {header.size} bytes, the index {member.size}")
    return content[tarfile.BLOCKSIZE :]


def _misplaced(file: ShardFile, member: Member, origin: str, how: str) -> DataError:
    return DataError(
        f"{origin}: {member.name!r} is not at byte {member.offset} of {file.url}: {how}; the index belongs to another "
        "tar, or the shard is damaged: copy or write the shard again",
        reason="a member is not where the index says",
    )
