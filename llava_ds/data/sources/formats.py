"""Every format that ``data.path`` may have: a function that opens it as a ``Source``.

To add one, write ``open_...(settings) -> Source`` and give it a name in ``_FORMATS``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_ds.data.sources.llava_json import open_llava_json, open_llava_jsonl
from llava_ds.data.sources.source import Source
from llava_ds.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Settings:
    path: str
    image_root: Path | None
    split: str | None
    prompt_format: str

    def root(self) -> Path:
        """Where relative image paths start: the given folder, or that of the data."""
        path = Path(self.path)
        return (self.image_root or (path if path.is_dir() else path.parent)).absolute()


def open_source(
    path: str,
    format: str = "auto",
    image_root: str | None = None,
    split: str | None = None,
    prompt_format: str = "QCM-LEA",
) -> Source:
    """The records of a file, folder or URL.

    Args:
        format: ``auto`` looks at the path; see ``list_formats``.
        image_root: where relative image paths start; by default the folder of the data.
        split: of ScienceQA and of Hugging Face data sets; by default ``train``, or the only one.
        prompt_format: of ScienceQA.

    Raises:
        ConfigError: an unknown format, or a path whose format cannot be told.
        DataError: the path is missing or broken.
    """
    settings = _Settings(path, Path(image_root) if image_root else None, split, prompt_format)
    name = _detect(path) if format == "auto" else format
    if name not in _FORMATS:
        near = difflib.get_close_matches(name, _FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown data format {name!r}; {hint}Known formats: {', '.join(list_formats())}")
    return _FORMATS[name](settings)


def list_formats() -> list[str]:
    """The names of the formats."""
    return ["auto", *_FORMATS]


def _captions(settings: _Settings) -> Source:
    from llava_ds.data.sources.captions import open_captions

    return open_captions(Path(settings.path), settings.root())


def _scienceqa(settings: _Settings) -> Source:
    from llava_ds.data.sources.scienceqa import open_scienceqa

    return open_scienceqa(
        Path(settings.path), settings.image_root, settings.split or "train", settings.prompt_format
    )


def _hf_dataset(settings: _Settings) -> Source:
    from llava_ds.data.sources.hf_datasets import open_hf_dataset

    return open_hf_dataset(Path(settings.path), settings.image_root, settings.split)


def _shards(settings: _Settings) -> Source:
    from llava_ds.data.sources.shards import open_shards

    return open_shards(settings.path)


_FORMATS: dict[str, Callable[[_Settings], Source]] = {
    "llava_json": lambda settings: open_llava_json(Path(settings.path), settings.root()),
    "llava_jsonl": lambda settings: open_llava_jsonl(Path(settings.path), settings.root()),
    "captions": _captions,
    "scienceqa": _scienceqa,
    "hf_dataset": _hf_dataset,
    "shards": _shards,
}


def _detect(path: str) -> str:
    """The format by what the path looks like. Raises DataError when there is nothing there, or nothing known."""
    found = Path(path)
    if "://" in path or path.endswith(".tar") or ("{" in path and not found.exists()):
        return "shards"
    if found.is_dir():
        return _detect_folder(found)
    if not found.is_file():
        raise DataError(f"data.path={path}: no such file or folder; give the training data", reason="no such file")
    kind = {".json": "llava_json", ".jsonl": "llava_jsonl", ".csv": "captions", ".parquet": "captions"}.get(
        found.suffix.lower()
    )
    if kind is None:
        raise DataError(
            f"data.path={path}: the format cannot be told from the name; set data.format to one of "
            f"{', '.join(list_formats()[1:])}",
            reason="unknown format",
        )
    if kind == "llava_jsonl" and _first_line_is_caption(found):
        return "captions"
    return kind


def _detect_folder(folder: Path) -> str:
    if (folder / "problems.json").is_file():
        return "scienceqa"
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return "hf_dataset"
    if any(folder.glob("*.tar")) or any(folder.glob("shards.json*")):
        return "shards"
    raise DataError(
        f"data.path={folder}: no data set is known in this folder; wanted problems.json (ScienceQA), state.json or "
        "dataset_dict.json (Hugging Face) or *.tar (shards)",
        reason="unknown format",
    )


def _first_line_is_caption(file: Path) -> bool:
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    return b'"conversations"' not in first and (b'"caption"' in first or b'"text"' in first)
