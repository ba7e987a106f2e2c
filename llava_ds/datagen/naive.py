"""Caption pairs by the paper's naive rule, as LLaVA JSON: a brief instruction, and the caption as its answer."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_ds.data.sources.captions import CaptionSource, open_captions
from llava_ds.datagen.balance import MAX_PER_PHRASE, MIN_FREQUENCY, Balanced, balance
from llava_ds.datagen.noun_phrases import FindPhrases
from llava_ds.datagen.output import OutputFolder
from llava_ds.datagen.records import BadRecords, OnBadRecord
from llava_ds.datagen.validate import FAULTS, SPECIAL_TOKEN
from llava_ds.errors import DataError
from llava_ds.schema import Sample

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the numbers of pairs while they are gone through."""


@dataclass(frozen=True)
class NounPhraseFilter:
    """The balancing filter. ``name`` of what finds the phrases and the ``packages`` behind it are for the record."""

    find: FindPhrases
    name: str
    min_frequency: int = MIN_FREQUENCY
    max_per_phrase: int = MAX_PER_PHRASE
    packages: tuple[str, ...] = ("spacy",)


def write_naive(
    pairs: Path,
    out: Path,
    seed: int = 0,
    on_bad_record: OnBadRecord = "error",
    phrase_filter: NounPhraseFilter | None = None,
    progress: Progress = lambda numbers: numbers,
) -> dict[str, Any]:
    """Writes the pairs of a .jsonl, .csv or .parquet file into the folder ``out``, and returns the report.

    Pairs are read one at a time, with a filter once more before; the phrases of all captions are in memory then.
    Raises DataError for a broken file or pair, ConfigError when ``out`` was begun with other settings.
    """
    source = open_captions(pairs, pairs.parent, seed)
    folder = OutputFolder(out, _inputs(source, phrase_filter), None, phrase_filter.packages if phrase_filter else ())
    folder.begin()
    bad = BadRecords(on_bad_record)
    numbers: Iterable[int] = range(len(source))
    counts = {}
    if phrase_filter:
        numbers, balanced = _choose(source, phrase_filter, bad, progress)
        counts = {name: value for name, value in asdict(balanced).items() if name != "captions"}
    samples = _read(source, progress(numbers), bad)
    produced = folder.write_records(_record(sample, source.image_root) for sample in samples)
    report = {
        "is_complete": True,
        "left_out_of_records": dict(sorted(bad.counts.items())),
        "num_pairs": len(source),
        "num_written": produced,
        **counts,
    }
    folder.finish(report)
    return report


def _inputs(source: CaptionSource, phrase_filter: NounPhraseFilter | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"kind": "naive", "seed": source.seed, "records_sha256": source.rows.fingerprint}
    if phrase_filter:
        inputs["filter"] = {name: getattr(phrase_filter, name) for name in ("name", "min_frequency", "max_per_phrase")}
    return inputs


def _choose(
    source: CaptionSource, phrase_filter: NounPhraseFilter, bad: BadRecords, progress: Progress
) -> tuple[list[int], Balanced]:
    """The numbers of the pairs that the filter takes."""
    numbers = array("Q")

    def captions() -> Iterator[str]:
        for number in progress(range(len(source))):
            for sample in _read(source, [number], bad):
                numbers.append(number)
                yield sample.turns[1].text

    phrases = phrase_filter.find(captions())
    balanced = balance(phrases, phrase_filter.min_frequency, phrase_filter.max_per_phrase, source.seed)
    return [numbers[caption] for caption in balanced.captions.tolist()], balanced


def _read(source: CaptionSource, numbers: Iterable[int], bad: BadRecords) -> Iterator[Sample]:
    for number in numbers:
        try:
            sample = source[number]
            if not isinstance(sample.images[0], str):
                raise DataError(
                    f"{sample.where()}: the picture is inside the file, and LLaVA JSON names files; train from the "
                    "file as it is, or write the pictures out first",
                    "a picture inside the file",
                )
            if found := FAULTS[SPECIAL_TOKEN].search(sample.turns[1].text):
                raise DataError(f"{sample.where()}: the caption holds {found[0].strip()!r}", SPECIAL_TOKEN)
        except DataError as error:
            bad.handle(error)
        else:
            yield sample


def _record(sample: Sample, root: Path) -> dict[str, Any]:
    question, answer = (turn.text for turn in sample.turns)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    image = str(sample.images[0]).removeprefix(f"{root}/")  # as the pair names it
    return {"id": sample.id, "image": image, "conversations": turns}
