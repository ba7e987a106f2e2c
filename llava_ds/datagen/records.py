"""What is known of an image without looking at it: its captions and boxes, here as JSONL, in coco.py as COCO has it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_ds.data.sources.jsonl import open_jsonl, parse_line
from llava_ds.data.sources.llava_json import check_unicode, is_number
from llava_ds.errors import DataError

OnBadRecord = Literal["error", "skip"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Instance:
    """One thing: its category and its box (left, top, right, bottom) as fractions of the image."""

    category: str
    box: Box


@dataclass(frozen=True)
class AnnotatedImage:
    """An image by its annotations. ``image`` is its path, as the training data will name it."""

    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[Instance, ...]


@dataclass
class Records:
    """The images of a file, in its order; ``fingerprint`` changes with what it says.

    ``left_out`` counts by reason what was no good (with ``skip``), or is left out on purpose.
    """

    images: list[AnnotatedImage]
    fingerprint: str
    left_out: Counter[str] = field(default_factory=Counter)


class BadRecords:
    """What happens to a bad record: it is raised, or counted by reason."""

    def __init__(self, policy: OnBadRecord) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()

    def handle(self, error: DataError) -> None:
        """Raises ``error`` under the policy ``error``, and counts it under ``skip``."""
        if self.policy == "error":
            raise DataError(
                f"{error}\n  Fix the record, or leave such records out with --on-bad-record skip.", error.reason
            ) from error
        self.counts[error.reason] += 1


def read_jsonl(path: Path, on_bad_record: OnBadRecord = "error") -> Records:
    """Lines ``{"id", "image", "captions": [text], "instances"?: [{"category", "bbox"}]}``.

    ``bbox`` is [left, top, right, bottom] as fractions of the image.
    Raises DataError for a missing file, and for a bad line unless such are skipped.
    """
    file, bad = open_jsonl(path), BadRecords(on_bad_record)
    seen: set[str] = set()
    images = []
    for number in range(len(file)):
        where = file.where(number)
        try:
            image = parse_image(parse_line(file[number], where), where)
            check_new(image.id, seen, where)
        except DataError as error:
            bad.handle(error)
        else:
            images.append(image)
    return Records(check_some(images, path, bad.counts), file.fingerprint, bad.counts)


def parse_image(record: Any, where: str) -> AnnotatedImage:
    """One line of the JSONL form. Raises DataError that begins with ``where``."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}", "not an object")
    image_id = record.get("id")
    if not isinstance(image_id, str | int) or isinstance(image_id, bool) or image_id == "":
        raise DataError(f"{where}: 'id' must be text or a number, got {image_id!r:.80}", "no 'id'")
    where = f"{where} id={str(image_id)!r}"
    check_unicode(where, str(image_id))
    image = parse_path(record, "image", where)
    captions = parse_captions(record.get("captions"), where)
    instances = record.get("instances", [])
    if not isinstance(instances, list):
        raise DataError(f"{where}: 'instances' must be a list, got {instances!r:.80}", "'instances' is no list")
    boxes = tuple(_parse_instance(instance, f"{where} instance {number}") for number, instance in enumerate(instances))
    return AnnotatedImage(str(image_id), image, captions, boxes)


def parse_path(record: dict[str, Any], name: str, where: str) -> str:
    """The path of a picture, as it stands in the field ``name``. Raises DataError when there is none."""
    path = record.get(name)
    if not isinstance(path, str) or not path:
        raise DataError(f"{where}: {name!r} must be the path of a picture, got {path!r:.80}", f"no {name!r}")
    check_unicode(where, path)
    return path


def parse_captions(captions: Any, where: str) -> tuple[str, ...]:
    """Captions on one line each, at least one. Raises DataError."""
    if not isinstance(captions, list) or not captions:
        raise DataError(f"{where}: 'captions' must be a list with a caption, got {captions!r:.80}", "no caption")
    return tuple(one_line(caption, f"{where} caption {number}", "caption") for number, caption in enumerate(captions))


def one_line(text: Any, where: str, what: str) -> str:
    """A text with every run of white space as one space. Raises DataError when there is no text."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected a {what}, got {text!r:.80}", f"an empty {what}")
    check_unicode(where, text)
    return " ".join(text.split())


def _parse_instance(instance: Any, where: str) -> Instance:
    if not isinstance(instance, dict):
        raise DataError(f"{where}: expected an object, got {instance!r:.80}", "an instance is no object")
    return Instance(one_line(instance.get("category"), where, "category"), parse_box(instance.get("bbox"), where))


def parse_box(box: Any, where: str) -> Box:
    """A normalised box. Raises DataError when it is none, is empty, or leaves the image."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise DataError(f"{where}: 'bbox' must be 4 numbers, got {box!r:.80}", "'bbox' is not 4 numbers")
    left, top, right, bottom = map(float, box)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise DataError(
            f"{where}: 'bbox' {list(box)} must be [left, top, right, bottom] as fractions of the image, with left < "
            "right and top < bottom",
            "'bbox' is empty or leaves the image",
        )
    return left, top, right, bottom


def check_new(image_id: str, seen: set[str], where: str) -> None:
    """Adds an id to those seen. Raises DataError when it was there: samples are called after it."""
    if image_id in seen:
        raise DataError(f"{where}: the id {image_id!r} stands twice; give each image its own", "an id stands twice")
    seen.add(image_id)


def check_some(images: list[AnnotatedImage], path: Path, left_out: Counter[str]) -> list[AnnotatedImage]:
    """The images. Raises DataError when there are none."""
    if not images:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it holds no records"
        raise DataError(f"{path}: no image is left ({reasons}); give captions and boxes")
    return images

