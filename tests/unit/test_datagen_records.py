"""Annotations in both forms become the same images and symbols; bad ones are named, or left out and counted."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.read import read_records
from llava_ds.datagen.records import AnnotatedImage, Instance, read_jsonl
from llava_ds.datagen.symbolic import describe_image
from llava_ds.errors import ConfigError, DataError

GOOD = {
    "id": "7",
    "image": "a/7.jpg",
    "captions": ["A cat\n sleeps. ", "Ünder  a tree"],
    "instances": [{"category": "cat", "bbox": [0, 0.25, 0.5, 1]}],
}
CAPTIONS = {
    "images": [
        {"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "width": 200, "height": 100},
        {"id": 9, "file_name": "9.jpg", "width": 3, "height": 3},
    ],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "nine"},
        {"image_id": 42, "id": 2, "caption": "two dogs "},
        {"image_id": 42, "id": 3, "caption": "Dogs."},
    ],
}
INSTANCES = {
    "images": CAPTIONS["images"],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"image_id": 42, "category_id": 18, "bbox": [20, 10, 100, 45.5], "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]},
        {"image_id": 42, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 1, "segmentation": {"counts": [1]}},
        {"image_id": 42, "category_id": 1, "bbox": [150.5, 0, 50, 100], "iscrowd": 0},
    ],
}


def write_jsonl(folder: Path, *records) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_coco(folder: Path, captions=CAPTIONS, instances=INSTANCES) -> tuple[Path, Path]:
    paths = folder / "captions_train.json", folder / "instances_train.json"
    for path, tables in zip(paths, (captions, instances), strict=True):
        path.write_text(json.dumps(tables))
    return paths


def test_a_line_becomes_an_image(tmp_path):
    records = read_records(write_jsonl(tmp_path, GOOD, {**GOOD, "id": 8, "instances": []}), None, "error")
    assert records.images == [
        AnnotatedImage(
            "7", "a/7.jpg", ("A cat sleeps.", "Ünder a tree"), (Instance("cat", (0.0, 0.25, 0.5, 1.0)),)
        ),
        AnnotatedImage("8", "a/7.jpg", ("A cat sleeps.", "Ünder a tree"), ()),
    ]
    assert not records.left_out


def test_symbols_by_kind():
    things = Instance("cat", (0, 0.25, 0.5, 1)), Instance("t v", (0.1234, 0.9996, 1 / 3, 1))
    image = AnnotatedImage("7", "7.jpg", ("One.", "Two."), things)
    assert describe_image(image, KINDS["conversation"]) == "One.\nTwo."
    with_boxes = "One.\nTwo.\n\ncat: [0.000, 0.250, 0.500, 1.000]\nt v: [0.123, 1.000, 0.333, 1.000]"
    assert describe_image(image, KINDS["detail"]) == describe_image(image, KINDS["complex"]) == with_boxes
    assert describe_image(AnnotatedImage("7", "7.jpg", ("One.",), ()), KINDS["detail"]) == "One."


BAD = {
    "not an object": [1],
    "no 'id'": {**GOOD, "id": None},
    "no 'image'": {**GOOD, "image": ["a.jpg"]},
    "no caption": {**GOOD, "captions": []},
    "an empty caption": {**GOOD, "captions": ["x", " \n"]},
    "'instances' is no list": {**GOOD, "instances": {"category": "cat"}},
    "an instance is no object": {**GOOD, "instances": ["cat"]},
    "an empty category": {**GOOD, "instances": [{"bbox": [0, 0, 1, 1]}]},
    "'bbox' is not 4 numbers": {**GOOD, "instances": [{"category": "cat", "bbox": [0, 0, 1, True]}]},
    "'bbox' is empty or leaves the image": {**GOOD, "instances": [{"category": "cat", "bbox": [0.5, 0, 0.5, 1]}]},
    "not Unicode text": {**GOOD, "captions": ["\ud800"]},
    "an id stands twice": GOOD,
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_lines_are_named_or_counted(tmp_path, reason):
    path = write_jsonl(tmp_path, GOOD, {**GOOD, "id": "other"}, BAD[reason])
    with pytest.raises(DataError, match=r"^records\.jsonl:3.*(\n.*)*--on-bad-record skip") as raised:
        read_jsonl(path)
    assert raised.value.reason == reason
    records = read_jsonl(path, "skip")
    assert [image.id for image in records.images] == ["7", "other"]
    assert records.left_out == Counter({reason: 1})


def test_boxes_that_are_no_boxes(tmp_path):
    for bbox in (
        [0, 0, 1], [0, 0, 1, float("nan")], [0, 0, 1, 10**400], [0, 0, 1, 1.001], [-0.001, 0, 1, 1], [0, 1, 1, 0], None,
        "0123",
    ):
        path = write_jsonl(tmp_path, {**GOOD, "instances": [{"category": "cat", "bbox": bbox}]})
        with pytest.raises(DataError, match="bbox"):
            read_jsonl(path)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no image is left .2 no 'id'"):
        read_jsonl(write_jsonl(tmp_path, {**GOOD, "id": ""}, {**GOOD, "id": 1.5}), "skip")


def test_coco_is_joined_and_normalised(tmp_path):
    records = read_records(*write_coco(tmp_path), "error")
    assert records.images == [
        AnnotatedImage(
            "000000000042", "COCO_train2014_000000000042.jpg", ("two dogs", "Dogs."),
            (Instance("dog", (0.1, 0.1, 0.6, 0.555)), Instance("person", (0.7525, 0.0, 1.0, 1.0))),
        ),
        AnnotatedImage("000000000009", "9.jpg", ("nine",), ()),
    ]
    assert list(records.left_out.items()) == [("crowd boxes, which stand for many things at once", 1)]


def test_coco_rows_that_stand_twice_alike_and_names_with_spaces(tmp_path):
    captions = changed(CAPTIONS, "images", 0, file_name="my  photo.jpg")
    instances = more(more(INSTANCES, "images", INSTANCES["images"][0]), "categories", INSTANCES["categories"][0])
    images = read_records(*write_coco(tmp_path, captions, instances), "error").images
    assert [image.image for image in images] == ["my  photo.jpg", "9.jpg"]
    assert [len(image.instances) for image in images] == [2, 0]


def changed(tables, table, number, **values):
    rows = [dict(row) for row in tables[table]]
    rows[number] |= values
    return {**tables, table: rows}


def more(tables, table, row):
    return {**tables, table: [*tables[table], row]}


@pytest.mark.parametrize(
    ("captions", "instances", "where", "reason", "num_left"),
    [
        (changed(CAPTIONS, "annotations", 1, caption=" "), INSTANCES, r"captions_train.json annotations\[1\]",
         "an empty caption", 2),
        (changed(CAPTIONS, "annotations", 0, image_id=None), INSTANCES, r"captions_train.json annotations\[0\]",
         "no 'image_id'", 1),
        (changed(CAPTIONS, "annotations", 0, image_id=8), INSTANCES, r"captions_train.json annotations\[0\]",
         "a caption of an unknown image", 1),
        (more(CAPTIONS, "images", CAPTIONS["images"][0]), INSTANCES, r"captions_train.json images\[2\]",
         "an id stands twice", 2),
        (changed(CAPTIONS, "images", 1, id=9.0), INSTANCES, r"captions_train.json images\[1\]", "no 'id'", 1),
        (changed(CAPTIONS, "images", 1, file_name=""), INSTANCES, r"captions_train.json images\[1\]",
         "no 'file_name'", 1),
        (CAPTIONS, changed(INSTANCES, "images", 1, id=5), r"captions_train.json images\[1\]",
         "an image without instances file", 1),
        (CAPTIONS, changed(INSTANCES, "images", 1, width=10**400), r"instances_train.json images\[1\]",
         "no size of an image", 1),
        (CAPTIONS, more(INSTANCES, "images", {**INSTANCES["images"][0], "width": 400}),
         r"instances_train.json images\[2\]", "an image id stands twice, and says two things", 2),
        (CAPTIONS, more(INSTANCES, "categories", {"id": 18, "name": "cat"}),
         r"instances_train.json categories\[2\]", "a category id stands twice, with two names", 2),
        (CAPTIONS, more(INSTANCES, "categories", {"id": "18", "name": "cat"}),
         r"instances_train.json categories\[2\]", "no 'id'", 2),
        (CAPTIONS, more(INSTANCES, "categories", {"id": 7}), r"instances_train.json categories\[2\]",
         "an empty category", 2),
        (CAPTIONS, changed(INSTANCES, "annotations", 0, iscrowd="0"), r"instances_train.json annotations\[0\]",
         "'iscrowd' is not 0 or 1", 2),
        (CAPTIONS, changed(INSTANCES, "annotations", 0, category_id=3), r"instances_train.json annotations\[0\]",
         "unknown category", 2),
        (CAPTIONS, changed(INSTANCES, "annotations", 0, category_id=[3]), r"instances_train.json annotations\[0\]",
         "no 'category_id'", 2),
        (CAPTIONS, changed(INSTANCES, "annotations", 0, bbox=[0, 0, 0, 9]), r"instances_train.json annotations\[0\]",
         "'bbox' is empty or leaves the image", 2),
        (CAPTIONS, changed(INSTANCES, "annotations", 0, bbox=[0, 0, 202, 9]), r"instances_train.json annotations\[0\]",
         "'bbox' is empty or leaves the image", 2),
        (CAPTIONS, changed(INSTANCES, "annotations", 0, image_id=1), r"instances_train.json annotations\[0\]",
         "a box of an unknown image", 2),
    ],
)
def test_bad_coco_rows(tmp_path, captions, instances, where, reason, num_left):
    paths = write_coco(tmp_path, captions, instances)
    with pytest.raises(DataError, match=f"^{where}") as raised:
        read_records(*paths, "error")
    assert raised.value.reason == reason
    records = read_records(*paths, "skip")
    assert records.left_out[reason] == 1
    assert len(records.images) == num_left


def test_files_that_do_not_go_together(tmp_path):
    captions, instances = write_coco(tmp_path)
    for path, second, words in (
        (captions, None, "--instances"), (write_jsonl(tmp_path, GOOD), instances, "holds boxes itself"),
        (tmp_path / "x.csv", None, "COCO's captions"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_records(path, second, "error")
    with pytest.raises(DataError, match="no list 'annotations'"):
        read_records(captions, write_coco(tmp_path, instances={"images": [], "categories": []})[1], "error")
    captions.write_text("[")
    with pytest.raises(DataError, match="not valid JSON"):
        read_records(captions, instances, "error")


@pytest.mark.skipif("LLAVA_DS_BENCH_COCO" not in os.environ, reason="LLAVA_DS_BENCH_COCO names no folder")
def test_the_shared_coco_records(tmp_path):
    path = tmp_path / "80.jsonl"  # an index is written beside it
    path.write_bytes((Path(os.environ["LLAVA_DS_BENCH_COCO"]) / "caps_boxes_coco2014_val_80.jsonl").read_bytes())
    images = read_jsonl(path).images
    assert (len(images), sum(len(image.captions) for image in images)) == (80, 401)
    assert describe_image(images[0], KINDS["detail"]).splitlines()[5:8] == [
        "", "donut: [0.370, 0.584, 0.504, 0.709]", "donut: [0.369, 0.220, 0.492, 0.317]"
    ]
