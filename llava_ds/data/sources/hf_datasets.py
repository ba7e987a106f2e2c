"""A folder that ``datasets.save_to_disk`` wrote (Hugging Face datasets, the extra llava_ds[data])."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_ds.data.sources.captions import caption_sample
from llava_ds.data.sources.llava_json import parse_record
from llava_ds.errors import BackendUnavailableError, ConfigError, DataError
from llava_ds.schema import Image, Sample, StoredImage

_IMAGE_COLUMNS = ("image", "images")
_TEXT_COLUMNS = ("id", "conversations", "caption", "text")


@dataclass(frozen=True)
class HfSource:
    """The rows of one split. ``rows`` stays memory-mapped; images are not decoded and read only when asked for."""

    name: str
    fingerprint: str
    rows: Any
    image_column: str | None
    image_root: Path
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError that names the row when it is bad."""
        number = range(len(self))[index]
        origin = f"{self.name}[{number}]"
        row = _read_row(self.rows, number, origin)
        images = self._images(row, number, origin)
        texts = {name: _plain(row[name][0], origin) for name in row.column_names if name in _TEXT_COLUMNS}
        sample_id = str(number) if texts.get("id") is None else str(texts["id"])
        if "conversations" in texts:
            record = {"id": sample_id, "conversations": _turns(texts["conversations"], origin)}
            return replace(parse_record(record, origin, Path()), images=tuple(images))
        if len(images) != 1:
            raise DataError(f"{origin}: a pair needs one image, got {len(images)}", reason="no image")
        caption = texts.get("caption") if texts.get("caption") is not None else texts.get("text")
        return caption_sample(sample_id, images[0], caption, origin, self.seed)

    def _images(self, row: Any, number: int, origin: str) -> list[Image]:
        if self.image_column is None:
            return []
        images: list[Image] = []
        for position, cell in enumerate(_cells(row[self.image_column][0])):
            path, has_bytes = _inspect(cell, origin)
            if has_bytes:
                name = f"{origin}:{path}" if path else f"{origin}:{position}"
                read = partial(_read_image, self.rows, number, self.image_column, position, origin)
                images.append(StoredImage(name, read))
            elif path:
                images.append(str(self.image_root / path))
            else:
                raise DataError(f"{origin}: image {position} has neither bytes nor a path", reason="no image")
        return images


def open_hf_dataset(path: Path, image_root: Path | None, split: str | None, seed: int = 0) -> HfSource:
    """The rows of a saved Dataset, or of one ``split`` of a saved DatasetDict.

    Columns: ``conversations`` (lists of ``from`` and ``value``), or ``caption`` (or ``text``) for pairs by the naive
    rule; ``image`` or ``images`` (paths, bytes or the Image feature, one or a list); ``id``, else the row's number.
    Paths start from ``image_root`` (default: the folder).

    Raises BackendUnavailableError without datasets, ConfigError for a wrong split, DataError for a folder that is no
    saved dataset, has no row, or lacks these columns.
    """
    rows, folder = _load(path, split)
    columns = rows.column_names
    image_columns = [name for name in _IMAGE_COLUMNS if name in columns]
    if "conversations" not in columns and not ({"caption", "text"} & set(columns) and image_columns):
        raise DataError(
            f"{folder}: needs 'conversations', or 'image' and 'caption' (or 'text'); found {', '.join(columns)}"
        )
    if len(image_columns) > 1:
        raise DataError(f"{folder}: has both 'image' and 'images'; remove one of the columns")
    if not len(rows):
        raise DataError(f"{folder}: no row; save a dataset with rows")
    used = [name for name in columns if name in _TEXT_COLUMNS or name in image_columns]
    rows = rows.select_columns(used).with_format("arrow")  # as stored: the Image feature is not decoded
    root = (image_root or path).absolute()
    fingerprint = _fingerprint(folder, f"{root}|{seed}")
    name = path.name if folder == path else f"{path.name}/{folder.name}"
    return HfSource(name, fingerprint, rows, image_columns[0] if image_columns else None, root, seed)


def _load(path: Path, split: str | None) -> tuple[Any, Path]:
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise BackendUnavailableError(
            f"{path}: saved datasets need the package datasets ({error}); run: pip install -e \".[data]\""
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except IndexError as error:  # what datasets raises for a folder without rows
        raise DataError(f"{path}: no row; save a dataset with rows") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: not a folder of datasets.save_to_disk that can be read: {type(error).__name__}: {error}; "
            "save it again"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        if split is not None and str(found.split) != split:
            raise ConfigError(f"{path}: one dataset, not split {split!r} of several; leave the split out")
        return found, path
    if split is None and len(found) != 1:
        raise ConfigError(f"{path}: choose a split: {', '.join(found)}")
    if split is not None and split not in found:
        raise ConfigError(f"{path}: no split {split!r}; it holds {', '.join(found)}")
    chosen = split or next(iter(found))
    return found[chosen], path / chosen


def _fingerprint(folder: Path, settings: str) -> str:
    digest = hashlib.sha256((folder / "state.json").read_bytes())  # holds the dataset's own fingerprint
    for file in sorted(folder.glob("*.arrow")):
        found = file.stat()
        digest.update(f"{file.name}|{found.st_size}|{found.st_mtime_ns}\n".encode())
    digest.update(settings.encode())
    return digest.hexdigest()


def _read_row(rows: Any, number: int, origin: str) -> Any:
    import pyarrow

    try:
        row = rows[number]
        row.validate(full=True)  # a damaged file would be read out of its bounds
        return row
    except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
        raise _undecodable(origin, error) from error


def _undecodable(origin: str, error: Exception) -> DataError:
    return DataError(f"{origin}: does not decode: {error}; save the dataset again", reason="a row does not decode")


def _plain(cell: Any, origin: str) -> Any:
    try:
        return cell.as_py()
    except (ValueError, IndexError) as error:  # e.g. bytes that are no UTF-8
        raise _undecodable(origin, error) from error


def _cells(cell: Any) -> list[Any]:
    import pyarrow

    if not cell.is_valid:
        return []
    return list(cell) if isinstance(cell, pyarrow.ListScalar) else [cell]


def _inspect(cell: Any, origin: str) -> tuple[str, bool]:
    """The path of an image, and whether its bytes are stored; the bytes are not touched."""
    import pyarrow

    if isinstance(cell, pyarrow.StructScalar):
        parts = {name: cell[name] for name in cell if name in ("bytes", "path")} if cell.is_valid else {}
        path = _plain(parts["path"], origin) if "path" in parts else None
        return path or "", "bytes" in parts and parts["bytes"].is_valid
    if pyarrow.types.is_binary(cell.type) or pyarrow.types.is_large_binary(cell.type):
        return "", cell.is_valid
    value = _plain(cell, origin)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{origin}: an image must be a path or bytes, got {value!r:.80}", reason="'image' is no path")
    return value or "", False


def _read_image(rows: Any, number: int, column: str, position: int, origin: str) -> bytes:
    cell = _cells(_read_row(rows, number, origin)[column][0])[position]
    value = _plain(cell, origin)
    return value["bytes"] if isinstance(value, dict) else value


def _turns(value: Any, origin: str) -> Any:
    """Turns as a list of objects; datasets before 4.0 stored them as an object of lists."""
    if not isinstance(value, dict):
        return value
    speakers, texts = value.get("from"), value.get("value")
    if not isinstance(speakers, list) or not isinstance(texts, list) or len(speakers) != len(texts):
        raise DataError(
            f"{origin}: 'conversations' needs as many 'from' as 'value'", reason="'conversations' is no list"
        )
    return [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
