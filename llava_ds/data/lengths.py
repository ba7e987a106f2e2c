"""Exact lengths of every record, computed in parallel once, and kept by data, tokenizer and template.

They are known before any image is decoded, and a bad record is found before training, not in the middle of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_ds.cache import cache_folder
from llava_ds.data.forked import map_forked
from llava_ds.data.images import IMAGE_REASONS, check_image_header
from llava_ds.data.length_cache import keep_rows, load_rows
from llava_ds.data.length_table import GOOD, ROW, LengthTable
from llava_ds.data.sources.source import Source
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.schema import Sample
from llava_ds.text.encode import TOO_LONG
from llava_ds.text.placement import sample_key
from llava_ds.text.truncation import NOTHING_LEFT

_CHUNK = 512
_FEW = 2 * _CHUNK  # so many are measured as fast as the kept lengths are found


def measure_source(
    source: Source,
    text: TextPipeline,
    on_bad_sample: str,
    num_processes: int | None = None,
    log: Callable[[str], None] = print,
) -> LengthTable:
    """The lengths of a source, from the cache folder or computed now by ``num_processes`` (default: one a core).

    Pictures are looked for (``error``), or their headers read (``skip``); those found bad are looked at again the next
    time. Records that the truncation policy leaves out are counted as skipped whatever ``on_bad_sample`` says.

    Raises DataError that names the first bad records and counts all by reason, unless ``on_bad_sample`` is ``skip``.
    """
    work = _Work(source, text, on_bad_sample == "skip")
    if len(source) <= _FEW:
        _, rows, reasons = work.chunk(range(len(source)))
        return _checked(work, LengthTable(rows, tuple(reasons), text.placement == "random", text.seed), on_bad_sample)
    key = hashlib.sha256(f"{source.fingerprint}|{text.fingerprint()}|{on_bad_sample}".encode()).hexdigest()
    file = cache_folder() / "lengths" / f"{key[:32]}.npy"
    known = load_rows(file, len(source))
    if known is None:
        todo: Sequence[int] | range = range(len(source))
        rows, reasons = np.zeros(len(source), ROW), list[str]()
    else:
        rows, reasons = known
        again = [number for number, reason in enumerate(reasons) if reason in IMAGE_REASONS]
        todo = np.flatnonzero(np.isin(rows["reason"], again)).tolist()
        rows = rows.copy() if todo else rows
    for indices, chunk, chunk_reasons in _run(work, todo, num_processes or len(os.sched_getaffinity(0)), log):
        for reason in chunk_reasons:
            if reason not in reasons:
                reasons.append(reason)
        renumber = np.array([*(reasons.index(reason) for reason in chunk_reasons), GOOD], dtype=np.int16)
        chunk["reason"] = renumber[chunk["reason"]]
        rows[indices] = chunk
    if len(todo):
        keep_rows(file, rows, reasons, log)
    return _checked(work, LengthTable(rows, tuple(reasons), text.placement == "random", text.seed), on_bad_sample)


@dataclass(frozen=True)
class _Work:
    source: Source
    text: TextPipeline
    reads_headers: bool

    def measure(self, index: int) -> tuple:
        """The values of a row. Raises DataError for a bad record."""
        sample = self.source[index]
        first, last = self.text.encode_orders(sample)
        self._check_images(sample)
        pair = (first, last)
        return (
            [len(e.input_ids) for e in pair], [e.num_supervised for e in pair], [len(e.images) for e in pair],
            max(e.num_cut_tokens for e in pair), sample_key(sample.id), GOOD,
        )

    def chunk(self, indices: Sequence[int]) -> tuple[Sequence[int], np.ndarray, list[str]]:
        """Rows of some records, and the reasons that they number."""
        rows, reasons = np.zeros(len(indices), ROW), []
        for number, index in enumerate(indices):
            try:
                rows[number] = self.measure(index)
            except DataError as error:
                if error.reason not in reasons:
                    reasons.append(error.reason)
                rows[number]["reason"] = reasons.index(error.reason)
        return indices, rows, reasons

    def _check_images(self, sample: Sample) -> None:
        for image in sample.images:
            if not isinstance(image, str):
                continue
            if self.reads_headers:
                check_image_header(image)
            elif not os.path.isfile(image):
                raise DataError(
                    f"{sample.where()}: image {image}: no such file; fix the path or data.image_root",
                    reason=IMAGE_REASONS[0],
                )


def _run(
    work: _Work, todo: Sequence[int], num_processes: int, log: Callable[[str], None]
) -> Iterator[tuple[Sequence[int], np.ndarray, list[str]]]:
    chunks = [todo[start : start + _CHUNK] for start in range(0, len(todo), _CHUNK)]
    if not chunks:
        return
    num_processes = min(num_processes, len(chunks))
    log(f"{work.source.name}: measuring {len(todo)} records with {num_processes} process(es), once")
    yield from map_forked(work.chunk, chunks, num_processes, "record")


def _checked(work: _Work, lengths: LengthTable, on_bad_sample: str) -> LengthTable:
    if on_bad_sample == "skip":
        return lengths
    dropped = (TOO_LONG, NOTHING_LEFT) if work.text.truncation != "error" else ()
    counts = {reason: n for reason, n in lengths.skipped().items() if reason not in dropped}
    if not counts:
        return lengths
    bad = np.array([reason in counts for reason in lengths.reasons] + [False])
    messages = []
    for index in np.flatnonzero(bad[lengths.rows["reason"]])[:5].tolist():
        try:
            work.measure(index)
        except DataError as error:
            messages.append(str(error))
    raise DataError(
        f"{work.source.name}: {sum(counts.values())} of {len(lengths)} records are bad: {counts}; the first:\n  "
        + "\n  ".join(messages)
        + "\n  Fix them, or set data.on_bad_sample=skip to leave them out (tools/doctor counts them all by kind)."
    )
