"""The form of annotations by their file's name."""

from __future__ import annotations

from pathlib import Path

from llava_ds.datagen.coco import read_coco
from llava_ds.datagen.records import OnBadRecord, Records, read_jsonl
from llava_ds.errors import ConfigError


def read_records(path: Path, instances: Path | None, on_bad_record: OnBadRecord) -> Records:
    """The images of a .jsonl file, or of COCO's captions and instances .json files.

    Raises ConfigError when the files do not go together, DataError when they are broken.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl" and instances is None:
        return read_jsonl(path, on_bad_record)
    if suffix == ".json" and instances is not None:
        return read_coco(path, instances, on_bad_record)
    if suffix == ".json":
        raise ConfigError(f"{path}: COCO's captions need the boxes of the same images: --instances instances_*.json")
    if suffix == ".jsonl":
        raise ConfigError(f"{path} holds boxes itself; --instances {instances} goes with COCO's captions_*.json only")
    raise ConfigError(f"{path}: annotations are read from .jsonl files and from COCO's captions_*.json")
