"""Image-caption pairs (JSONL, CSV, parquet), each expanded to one question and its answer.

The naive rule of the paper (section 4.1): the caption is the answer to a brief instruction that is drawn at random.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.sources.csv_rows import open_csv
from llava_ds.data.sources.jsonl import JsonlFile, open_jsonl, parse_line
from llava_ds.data.sources.llava_json import check_unicode
from llava_ds.data.sources.parquet_rows import open_parquet, parquet_columns
from llava_ds.errors import DataError
from llava_ds.schema import Image, Sample, StoredImage, Turn
from llava_ds.text.instructions import BRIEF_INSTRUCTIONS, draw_instruction

_COLUMNS = ("id", "image", "caption", "text")


class _Rows(Protocol):
    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def where(self, index: int) -> str: ...


@dataclass(frozen=True)
class CaptionSource:
    """The pairs of a file, in its order."""

    name: str
    fingerprint: str
    rows: _Rows
    image_root: Path
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError that names the record when it is no pair."""
        where = self.rows.where(index)
        return parse_caption(self.rows[index], range(len(self))[index], where, self.image_root, self.seed)


def open_captions(path: Path, image_root: Path, seed: int = 0) -> CaptionSource:
    """The pairs ``{"image", "caption", "id"?}`` of a .jsonl, .csv (with a header row) or .parquet file.

    The caption may also be called ``text``. The image is a path under ``image_root``; in parquet also bytes, or a
    struct of ``bytes`` and ``path`` as Hugging Face writes it. A pair without ``id`` is called after its image and
    number (``a.jpg#7``), or by its number where that is bytes. The question is a pure function of (seed, id).

    Raises DataError for a missing or broken file and for missing columns, BackendUnavailableError without pyarrow.
    """
    image_root = image_root.absolute()
    rows = _open_rows(path, image_root)
    fingerprint = hashlib.sha256(f"{rows.fingerprint}|{image_root}|{seed}".encode()).hexdigest()
    return CaptionSource(path.name, fingerprint, rows, image_root, seed)


def parse_caption(record: Any, number: int, origin: str, image_root: Path, seed: int) -> Sample:
    """The sample of a record with ``image`` (a path or a StoredImage), ``caption`` or ``text``, and perhaps ``id``.

    Raises DataError that begins with ``origin``.
    """
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}", reason="not an object")
    image = record.get("image")
    if not image or not isinstance(image, str | StoredImage):
        found = f"got {image!r:.80}" if "image" in record else f"found {', '.join(map(repr, record)) or 'nothing'}"
        raise DataError(f"{origin}: no 'image'; a pair needs the path of one ({found})", reason="no image")
    sample_id = record.get("id")
    if sample_id is None or sample_id == "":
        sample_id = f"{image}#{number}" if isinstance(image, str) else number  # a picture may have several captions
    full: Image = str(image_root / image) if isinstance(image, str) else image
    caption = record["caption"] if record.get("caption") is not None else record.get("text")
    return caption_sample(str(sample_id), full, caption, origin, seed)


def caption_sample(sample_id: str, image: Image, caption: Any, origin: str, seed: int) -> Sample:
    """One pair by the naive rule. Raises DataError that begins with ``origin`` when there is no caption."""
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(
            f"{origin} id={sample_id!r}: no 'caption' (or 'text'), got {caption!r:.80}; "
            "give the image a caption or drop the record",
            reason="no caption",
        )
    check_unicode(f"{origin} id={sample_id!r}", sample_id, caption, *([image] if isinstance(image, str) else []))
    question = draw_instruction(BRIEF_INSTRUCTIONS, seed, sample_id)
    turns = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}"), Turn("assistant", caption.strip()))
    return Sample(sample_id, (image,), turns, origin)


class _JsonlRows:
    def __init__(self, file: JsonlFile) -> None:
        self.file = file
        self.fingerprint = file.fingerprint

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Any:
        return parse_line(self.file[index], self.where(index))

    def where(self, index: int) -> str:
        return self.file.where(index)


def _open_rows(path: Path, image_root: Path) -> _Rows:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _JsonlRows(open_jsonl(path))
    if suffix == ".csv":
        rows = open_csv(path)
        _check_columns(path, rows.columns)
        return rows
    if suffix == ".parquet":
        _check_columns(path, parquet_columns(path))
        return open_parquet(path, _COLUMNS, "image", image_root)
    raise DataError(f"{path}: captions are read from .jsonl, .csv and .parquet files; rename or convert this one")


def _check_columns(path: Path, columns: list[str]) -> None:
    if "image" not in columns or not {"caption", "text"} & set(columns):
        raise DataError(
            f"{path}: the columns must be 'image' and 'caption' (or 'text'), and perhaps 'id'; "
            f"found {', '.join(map(repr, columns))}"
        )
