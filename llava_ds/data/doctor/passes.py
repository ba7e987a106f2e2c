"""The passes of tools/doctor over a data set: all records, then every distinct image, then what is there twice.

Images are the same when their paths are, ids and records when 8 bytes of their hash are. Memory stays under
200 bytes a record with one image.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_ds.data.doctor.findings import CATALOGUE, ERROR, NUM_EXAMPLES, Findings
from llava_ds.data.doctor.image_checks import check_image
from llava_ds.data.doctor.record_checks import RecordChecks
from llava_ds.data.doctor.salvage import read_record
from llava_ds.data.forked import map_forked
from llava_ds.data.sources.source import Source
from llava_ds.errors import DataError
from llava_ds.schema import Image

_ROW = np.dtype(
    [
        ("num_tokens", "i4"), ("num_supervised", "i4"), ("num_kept_images", "i4"), ("num_images", "i4"),
        ("id_key", "u8"), ("content_key", "u8"), ("is_read", "?"), ("is_bad", "?"),
    ]
)
_RECORDS_PER_CHUNK, _IMAGES_PER_CHUNK = 256, 32


@dataclass(frozen=True)
class RecordTable:
    """What the passes know: ``rows`` [records], and every mention of an image, ``image_keys`` and ``image_records``."""

    rows: np.ndarray
    image_keys: np.ndarray
    image_records: np.ndarray

    def positions(self, mentions: np.ndarray) -> np.ndarray:
        """Which image of its record a mention [n] is."""
        starts = np.cumsum(self.rows["num_images"]) - self.rows["num_images"]
        return mentions - starts[self.image_records[mentions]]


@dataclass
class _RecordChunk:
    rows: np.ndarray
    image_keys: array[int] = field(default_factory=lambda: array("Q"))
    findings: Findings = field(default_factory=Findings)


@dataclass
class _ImageChunk:
    numbers: dict[str, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("q")))
    """By finding, the numbers of the images that have it."""
    findings: Findings = field(default_factory=Findings)

    def __reduce__(self) -> tuple[type[_ImageChunk], tuple[dict[str, array[int]], Findings]]:
        return _ImageChunk, (dict(self.numbers), self.findings)


@dataclass(frozen=True)
class Examination:
    """The passes over one source."""

    source: Source
    checks: RecordChecks
    findings: Findings
    num_processes: int

    def look_at_records(self) -> RecordTable:
        """Reads every record once."""
        size = len(self.source)
        starts = range(0, size, _RECORDS_PER_CHUNK)
        chunks = [range(start, min(start + _RECORDS_PER_CHUNK, size)) for start in starts]
        rows, keys = np.zeros(size, _ROW), array("Q")
        for chunk, done in zip(chunks, map_forked(self._records, chunks, self.num_processes, "record"), strict=True):
            rows[chunk.start : chunk.stop] = done.rows
            keys.extend(done.image_keys)
            self.findings.merge(done.findings)
        return RecordTable(rows, np.array(keys, np.uint64), np.repeat(np.arange(size), rows["num_images"]))

    def look_at_images(self, table: RecordTable) -> dict[str, int]:
        """Decodes every distinct image once and marks the records of bad ones; returns images by finding."""
        _, first, number_of = np.unique(table.image_keys, return_index=True, return_inverse=True)
        order = np.argsort(first)  # as the records stand, so that archives are read forwards
        mentions = first[order]
        places = np.stack([order, table.image_records[mentions], table.positions(mentions)], axis=1)
        chunks = [places[start : start + _IMAGES_PER_CHUNK] for start in range(0, len(places), _IMAGES_PER_CHUNK)]
        numbers: dict[str, array[int]] = defaultdict(lambda: array("q"))
        for done in map_forked(self._images, chunks, self.num_processes, "image"):
            self.findings.merge(done.findings)
            for name, found in done.numbers.items():
                numbers[name].extend(found)
        for name, found in numbers.items():
            has_it = np.zeros(len(first), bool)
            has_it[found] = True
            records = np.unique(table.image_records[has_it[number_of]])
            self.findings.counts[name] = len(records)
            table.rows["is_bad"][records] |= CATALOGUE[name][0] == ERROR
        return {name: len(found) for name, found in numbers.items()}

    def find_shared_images(self, table: RecordTable) -> int:
        """Counts the records that have an image of another one; returns how many images those are."""
        order = np.lexsort((table.image_records, table.image_keys))
        keys, records = table.image_keys[order], table.image_records[order]
        is_new = np.ones(len(keys), bool)  # an image may stand twice in one record
        is_new[1:] = (keys[1:] != keys[:-1]) | (records[1:] != records[:-1])
        _, number_of, counts = np.unique(keys[is_new], return_inverse=True, return_counts=True)
        self.findings.counts["image_shared"] = len(np.unique(records[is_new][counts[number_of] > 1]))
        return int((counts > 1).sum())

    def find_repeats(self, table: RecordTable) -> None:
        """Counts records with the id, or the content, of an earlier one."""
        read = np.flatnonzero(table.rows["is_read"])
        for name, column in (("duplicate_id", "id_key"), ("duplicate_record", "content_key")):
            _, first, number_of = np.unique(table.rows[column][read], return_index=True, return_inverse=True)
            earlier = read[first[number_of]]
            repeats = np.flatnonzero(earlier != read)
            for number in repeats[:NUM_EXAMPLES].tolist():
                sample, before = self.source[int(read[number])], self.source[int(earlier[number])]
                self.findings.add(name, sample.origin, sample.id, f"the same as {before.where()}")
            self.findings.counts[name] = len(repeats)

    def _records(self, indices: range) -> _RecordChunk:
        chunk = _RecordChunk(np.zeros(len(indices), _ROW))
        for number, index in enumerate(indices):
            self._record(index, chunk.rows[number], chunk)
        return chunk

    def _record(self, index: int, row: Any, chunk: _RecordChunk) -> None:
        record = read_record(self.source, index)
        found, encoded = self.checks.check(record)
        sample = record.sample
        sample_id = sample.id if sample else record.error.sample_id if record.error else None
        if sample is not None:
            images = [_image_name(image) for image in sample.images]
            row["num_images"], row["is_read"] = len(images), record.error is None
            row["id_key"], row["content_key"] = _key(sample.id), _key(*images, *map(repr, sample.turns))
            chunk.image_keys.extend(map(_key, images))
        if encoded is not None:
            row["num_tokens"], row["num_supervised"] = len(encoded.input_ids), encoded.num_supervised
            row["num_kept_images"] = len(encoded.images)
        row["is_bad"] = any(CATALOGUE[name][0] == ERROR for name, _ in found)
        for name, message in found:
            chunk.findings.add(name, record.origin, sample_id, message)

    def _images(self, places: np.ndarray) -> _ImageChunk:
        """Of [n, 3]: number of the image, a record that has it, its position there."""
        chunk = _ImageChunk()
        for number, index, position in places.tolist():
            sample = read_record(self.source, index).sample
            if sample is None or len(sample.images) <= position:
                raise DataError(f"{self.source.name}[{index}]: the record has changed since it was read; start again")
            for name, message in check_image(sample.images[position]):
                chunk.numbers[name].append(number)
                chunk.findings.add(name, sample.origin, sample.id, message)
        return chunk


def _key(*texts: str) -> int:
    """8 bytes that stand for texts."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "little")


def _image_name(image: Image) -> str:
    return image if isinstance(image, str) else image.name
