"""COCO annotations: a captions file and an instances file of the same images, joined by image id."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_ds.data.sources.llava_json import is_number
from llava_ds.datagen.records import (
    AnnotatedImage,
    BadRecords,
    Instance,
    OnBadRecord,
    Records,
    check_new,
    check_some,
    one_line,
    parse_box,
    parse_path,
)
from llava_ds.errors import DataError

_CROWD = "crowd boxes, which stand for many things at once"


def read_coco(captions: Path, instances: Path, on_bad_record: OnBadRecord = "error") -> Records:
    """The images of ``captions_*.json`` with the boxes of ``instances_*.json``, in the order of the captions file.

    The id is COCO's in twelve digits. Boxes of pixels become fractions; crowd boxes are left out and counted. With
    ``skip``, a bad annotation is left out alone, and an image only when no caption is left.
    Raises DataError for a missing or broken file, and for a bad record unless such are skipped.
    """
    with_captions, captions_hash = _read(captions, ("images", "annotations"))
    with_boxes, boxes_hash = _read(instances, ("images", "annotations", "categories"))
    bad = BadRecords(on_bad_record)
    texts = _group_captions(with_captions, captions.name, bad)
    sizes = _read_sizes(with_boxes, instances.name, bad)
    boxes = _group_boxes(with_boxes, sizes, instances.name, bad)
    seen: set[str] = set()
    images = []
    for where, image in _each(with_captions, "images", captions.name, bad):
        try:
            found = _join(image, where, texts, boxes, sizes, instances.name)
            check_new(found.id, seen, where)
        except DataError as error:
            bad.handle(error)
        else:
            images.append(found)
    fingerprint = hashlib.sha256(f"{captions_hash}|{boxes_hash}".encode()).hexdigest()
    return Records(check_some(images, captions, bad.counts), fingerprint, bad.counts)


def _read(path: Path, wanted: tuple[str, ...]) -> tuple[dict[str, list[Any]], str]:
    """A file's tables and its hash. Outlines, most of the file, are thrown away while it is parsed."""
    advice = f"give a COCO file with {', '.join(wanted)}"
    try:
        content = path.read_bytes()
        tables = json.loads(content, object_hook=_without_outline)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}; {advice}") from error
    missing = [name for name in wanted if not isinstance(tables, dict) or not isinstance(tables.get(name), list)]
    if missing:
        raise DataError(f"{path}: no list {', '.join(map(repr, missing))}; {advice}")
    return tables, hashlib.sha256(content).hexdigest()


def _without_outline(value: dict[str, Any]) -> dict[str, Any]:
    value.pop("segmentation", None)
    return value


def _each(tables: dict[str, list[Any]], table: str, name: str, bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with its place for messages: ``captions.json annotations[17]``."""
    for number, row in enumerate(tables[table]):
        where = f"{name} {table}[{number}]"
        if isinstance(row, dict):
            yield where, row
        else:
            bad.handle(DataError(f"{where}: expected an object, got {row!r:.80}", f"a row of {table} is no object"))


def _group_captions(tables: dict[str, list[Any]], name: str, bad: BadRecords) -> dict[int, list[str]]:
    ids = (row.get("id") for row in tables["images"] if isinstance(row, dict))
    known = {image_id for image_id in ids if isinstance(image_id, int | float)}  # 42.0 is told of where it stands
    groups = defaultdict(list)
    for where, row in _each(tables, "annotations", name, bad):
        try:
            image_id = _number(row, "image_id", where)
            if image_id not in known:
                raise DataError(f"{where}: no image of {name} has the id {image_id}", "a caption of an unknown image")
            groups[image_id].append(one_line(row.get("caption"), where, "caption"))
        except DataError as error:
            bad.handle(error)
    return groups


def _read_sizes(tables: dict[str, list[Any]], name: str, bad: BadRecords) -> dict[int, tuple[float, float]]:
    """Width and height in pixels by image id."""
    images: dict[int, tuple[Any, ...]] = {}
    for where, row in _each(tables, "images", name, bad):
        image: tuple[Any, ...] = row.get("width"), row.get("height"), row.get("file_name")
        try:
            if not all(is_number(side) and side > 0 for side in image[:2]):
                raise DataError(
                    f"{where}: width and height must be numbers above 0, got {image[:2]!r:.80}", "no size of an image"
                )
            _add(images, _number(row, "id", where), image, where, "an image id stands twice, and says two things")
        except DataError as error:
            bad.handle(error)
    return {image_id: (width, height) for image_id, (width, height, _) in images.items()}


def _read_categories(tables: dict[str, list[Any]], name: str, bad: BadRecords) -> dict[int, str]:
    """Names by id."""
    categories: dict[int, str] = {}
    for where, row in _each(tables, "categories", name, bad):
        try:
            category = one_line(row.get("name"), where, "category")
            _add(categories, _number(row, "id", where), category, where, "a category id stands twice, with two names")
        except DataError as error:
            bad.handle(error)
    return categories


def _add(known: dict[int, Any], row_id: int, value: Any, where: str, reason: str) -> None:
    """Raises DataError when the id is known as something else."""
    if known.setdefault(row_id, value) != value:
        raise DataError(f"{where}: the id {row_id} is {value!r:.80} here, and {known[row_id]!r:.80} before", reason)


def _group_boxes(
    tables: dict[str, list[Any]], sizes: dict[int, tuple[float, float]], name: str, bad: BadRecords
) -> dict[int, list[Instance]]:
    categories = _read_categories(tables, name, bad)
    groups = defaultdict(list)
    for where, row in _each(tables, "annotations", name, bad):
        try:
            image_id = _number(row, "image_id", where)
            is_crowd = row.get("iscrowd", 0)
            if is_crowd not in (0, 1):
                raise DataError(f"{where}: 'iscrowd' must be 0 or 1, got {is_crowd!r:.80}", "'iscrowd' is not 0 or 1")
            if is_crowd:
                bad.counts[_CROWD] += 1
                continue
            category_id = _number(row, "category_id", where)
            if category_id not in categories:
                raise DataError(f"{where}: no category has the id {category_id}", "unknown category")
            if image_id not in sizes:
                raise DataError(f"{where}: no image of {name} has the id {image_id}", "a box of an unknown image")
            box = _normalise(row.get("bbox"), sizes[image_id], where)
            groups[image_id].append(Instance(categories[category_id], box))
        except DataError as error:
            bad.handle(error)
    return groups


def _normalise(box: Any, size: tuple[float, float], where: str) -> tuple[float, float, float, float]:
    """Fractions of [left, top, width, height] in pixels; what is over the edge by up to a pixel is rounding."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise DataError(f"{where}: 'bbox' must be 4 numbers, got {box!r:.80}", "'bbox' is not 4 numbers")
    left, top, width, height = box
    if min(left, top) < -1 or left + width > size[0] + 1 or top + height > size[1] + 1:
        raise DataError(
            f"{where}: 'bbox' {box} (left, top, width, height) leaves its image of {size[0]} x {size[1]} pixels",
            "'bbox' is empty or leaves the image",
        )
    edges = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    return parse_box([min(max(edge, 0.0), 1.0) for edge in edges], where)


def _join(
    row: dict[str, Any],
    where: str,
    texts: dict[int, list[str]],
    boxes: dict[int, list[Instance]],
    sizes: dict[int, tuple[float, float]],
    instances_name: str,
) -> AnnotatedImage:
    image_id = _number(row, "id", where)
    if image_id not in sizes:
        raise DataError(
            f"{where}: {instances_name} does not know the image {image_id}; give both files of one split",
            "an image without instances file",
        )
    if not texts.get(image_id):
        raise DataError(f"{where}: no caption of the image {image_id}", "no caption")
    captions, instances = tuple(texts[image_id]), tuple(boxes.get(image_id, ()))
    return AnnotatedImage(f"{image_id:012d}", parse_path(row, "file_name", where), captions, instances)


def _number(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {name!r} must be a whole number, got {value!r:.80}", f"no {name!r}")
    return value
