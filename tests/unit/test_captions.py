"""Pairs of image and caption in JSONL, CSV and parquet become the same samples; bad ones are named."""

import csv
import json
import multiprocessing
import pickle
import random
from collections import Counter

import pytest

from llava_ds.data.sources.captions import open_captions
from llava_ds.errors import DataError
from llava_ds.schema import Sample, StoredImage, Turn
from llava_ds.text.instructions import BRIEF_INSTRUCTIONS, DETAILED_INSTRUCTIONS, draw_instruction

PAIRS = [
    {"image": "a.jpg", "caption": 'A cat, "asleep".'},
    {"image": "b/c.jpg", "caption": "Two\nlines, ümläut \u2028 and \x0b\x1c odd breaks"},
    {"image": "d.png", "caption": "x"},
]


def _write_jsonl(folder, rows=PAIRS):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _write_csv(folder, rows=PAIRS):
    path = folder / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_parquet(folder, rows=PAIRS, schema=None, row_group_size=2):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = folder / "pairs.parquet"
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)
    return path


WRITERS = {"jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet}
ORIGINS = {
    "jsonl": ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"],
    "csv": ["pairs.csv:2", "pairs.csv:3", "pairs.csv:5"],
    "parquet": ["pairs.parquet[0]", "pairs.parquet[1]", "pairs.parquet[2]"],
}
formats = pytest.mark.parametrize("kind", WRITERS)


def _image_struct():
    pa = pytest.importorskip("pyarrow")
    return pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})


@formats
def test_every_format_gives_the_same_samples(tmp_path, kind):
    source = open_captions(WRITERS[kind](tmp_path), tmp_path / "img", seed=3)
    wanted = [
        Sample(
            f"{pair['image']}#{number}",
            (str(tmp_path / "img" / pair["image"]),),
            (
                Turn("user", f"<image>\n{draw_instruction(BRIEF_INSTRUCTIONS, 3, pair['image'] + f'#{number}')}"),
                Turn("assistant", pair["caption"]),
            ),
            origin,
        )
        for number, (pair, origin) in enumerate(zip(PAIRS, ORIGINS[kind], strict=True))
    ]
    assert [source[number] for number in range(len(source))] == wanted
    assert source[-1].id == f"d.png#{len(source) - 1}"
    with pytest.raises(IndexError):
        source[3]
    assert list(source) == wanted  # iteration ends at IndexError


@formats
def test_text_is_a_caption_and_an_id_is_kept(tmp_path, kind):
    source = open_captions(WRITERS[kind](tmp_path, [{"id": "7", "image": "a.jpg", "text": "A cat."}]), tmp_path)
    assert len(source) == 1
    assert source[0].id == "7"
    assert source[0].turns[1].text == "A cat."


@formats
def test_it_survives_pickling_and_fork(tmp_path, kind):
    source = open_captions(WRITERS[kind](tmp_path), tmp_path)
    wanted = list(source)  # the parent has read: children inherit what it holds
    assert list(pickle.loads(pickle.dumps(source))) == wanted
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(source.__getitem__, [0, 1, 2] * 20) == wanted * 20


@formats
def test_the_fingerprint_follows_what_samples_depend_on(tmp_path, kind):
    path = WRITERS[kind](tmp_path)
    prints = {open_captions(path, tmp_path).fingerprint for _ in range(2)}
    assert len(prints) == 1
    prints |= {open_captions(path, tmp_path, seed=1).fingerprint, open_captions(path, tmp_path / "x").fingerprint}
    WRITERS[kind](tmp_path, [*PAIRS, PAIRS[0]])
    prints |= {open_captions(path, tmp_path).fingerprint}
    assert len(prints) == 4


@formats
@pytest.mark.parametrize("pair", [{"image": "a.jpg", "caption": " \n"}, {"image": "", "caption": "A cat."}])
def test_a_bad_pair_is_named(tmp_path, kind, pair):
    source = open_captions(WRITERS[kind](tmp_path, [PAIRS[0], pair]), tmp_path)
    assert source[0].id == "a.jpg#0"
    with pytest.raises(DataError, match=r"no 'caption'|no 'image'") as caught:
        source[1]
    assert str(caught.value).startswith(
        {"jsonl": "pairs.jsonl:2", "csv": "pairs.csv:3", "parquet": "pairs.parquet[1]"}[kind]
    )
    assert caught.value.reason in ("no caption", "no image")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_columns_name_what_was_found(tmp_path, kind):
    with pytest.raises(DataError, match=r"'image' and 'caption'.*found 'picture', 'caption'"):
        open_captions(WRITERS[kind](tmp_path, [{"picture": "a", "caption": "b"}]), tmp_path)


def test_missing_keys_of_jsonl_name_what_was_found(tmp_path):
    source = open_captions(
        _write_jsonl(tmp_path, [{"picture": "a", "caption": "b"}, [1], {"image": "\ud800", "text": "x"}]), tmp_path
    )
    with pytest.raises(DataError, match=r"pairs.jsonl:1: no 'image'.*found 'picture', 'caption'"):
        source[0]
    with pytest.raises(DataError, match=r"pairs.jsonl:2: expected an object, got list"):
        source[1]
    with pytest.raises(DataError, match=r"not Unicode text"):
        source[2]


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "none.tsv"])
def test_missing_files_and_unknown_formats(tmp_path, name):
    with pytest.raises(DataError, match=name):
        open_captions(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"image,caption\n", b"image,caption\r\n\r\n", b"\n", b"image,image,caption\na,b,c\n"]
)
def test_a_csv_file_without_rows_or_header(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"x.csv"):
        open_captions(tmp_path / "x.csv", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'image,caption\na,b\nc,"d\ne,f\n', r"x.csv:3: not valid CSV"),
        (b"image,caption\na,\xff\n", r"x.csv:2: not UTF-8"),
    ],
)
def test_a_broken_csv_file_names_the_line(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path / "x.csv", tmp_path)


def test_a_csv_row_with_too_many_fields_and_one_file_that_changes(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfimage,caption\r\n\r\na.jpg,cat\r\nb.jpg,a,b\r\nc.jpg,last")
    source = open_captions(path, tmp_path)
    assert (source[0].id, source[2].id, source[2].turns[1].text) == ("a.jpg#0", "c.jpg#2", "last")
    with pytest.raises(DataError, match=r"x.csv:4: 3 fields, but the header names 2"):
        source[1]
    path.write_bytes(b"image,caption\na,b\n")
    with pytest.raises(DataError, match="has changed"):
        source[0]


def test_images_inside_parquet_are_read_when_asked_for(tmp_path):
    (tmp_path / "beside.png").write_bytes(b"from a file")
    rows = [
        {"image": {"bytes": b"one", "path": "one.png"}, "caption": "1"},
        {"image": {"bytes": None, "path": "beside.png"}, "caption": "2"},
        {"image": {"bytes": b"three", "path": None}, "caption": "3"},
        {"image": None, "caption": "4"},
    ]
    source = open_captions(_write_parquet(tmp_path, rows, _image_struct()), tmp_path)
    source = pickle.loads(pickle.dumps(source))
    images = [sample.images[0] for sample in source]
    assert all(isinstance(image, StoredImage) for image in images)
    assert [image.read() for image in images[:3]] == [b"one", b"from a file", b"three"]
    assert pickle.loads(pickle.dumps(images[0])).read() == b"one"
    assert [sample.id for sample in source] == ["0", "1", "2", "3"]
    assert images[0].name == "pairs.parquet[0]:one.png"
    assert images[2].name == "pairs.parquet[2]"
    with pytest.raises(DataError, match=r"pairs.parquet\[3\]: no image"):
        images[3].read()


def test_a_parquet_column_of_bytes(tmp_path):
    source = open_captions(_write_parquet(tmp_path, [{"image": b"one", "text": "1"}]), tmp_path)
    assert (len(source), source[0].id, source[0].images[0].read()) == (1, "0", b"one")


def test_parquet_of_another_kind_or_without_rows(tmp_path):
    with pytest.raises(DataError, match=r"of type int64; it must hold paths"):
        open_captions(_write_parquet(tmp_path, [{"image": 3, "caption": "1"}]), tmp_path)
    with pytest.raises(DataError, match="no row"):
        open_captions(_write_parquet(tmp_path, [], _image_struct()), tmp_path)


def test_parquet_reads_one_row_group_and_not_the_images_for_texts(tmp_path, monkeypatch):
    rows = [{"image": {"bytes": b"x" * 100, "path": f"{n}.png"}, "caption": str(n)} for n in range(10)]
    source = open_captions(_write_parquet(tmp_path, rows, _image_struct(), row_group_size=3), tmp_path)
    from pyarrow import parquet

    reads = []
    original = parquet.ParquetFile.read_row_group

    def spy(self, group, columns, **settings):
        reads.append((group, tuple(columns)))
        return original(self, group, columns=columns, **settings)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", spy)
    assert source[9].turns[1].text == "9"
    assert reads == [(3, ("caption", "image.path"))]
    assert source[4].images[0].read() == b"x" * 100
    assert reads[1:] == [(1, ("caption", "image.path")), (1, ("image",))]


def test_the_draw_is_even_and_depends_on_seed_and_id():
    assert (len(set(BRIEF_INSTRUCTIONS)), len(set(DETAILED_INSTRUCTIONS))) == (11, 16)
    drawn = Counter(draw_instruction(BRIEF_INSTRUCTIONS, 0, str(number)) for number in range(11_000))
    assert set(drawn) == set(BRIEF_INSTRUCTIONS)
    assert max(drawn.values()) < 1150 and min(drawn.values()) > 850
    assert any(
        draw_instruction(BRIEF_INSTRUCTIONS, seed, "a") != draw_instruction(BRIEF_INSTRUCTIONS, 0, "a")
        for seed in (1, 2)
    )
    # Pinned: a change would ask other questions in the second half of a resumed run.
    assert draw_instruction(BRIEF_INSTRUCTIONS, 0, "a") == BRIEF_INSTRUCTIONS[6]


@formats
def test_mutated_files_give_samples_or_data_errors(tmp_path, kind):
    content = bytearray(WRITERS[kind](tmp_path).read_bytes())
    random_bytes = random.Random(0)
    outcomes = Counter()
    for _ in range(200):
        mutated = bytearray(content)
        for _ in range(random_bytes.randint(1, 4)):
            mutated[random_bytes.randrange(len(mutated))] = random_bytes.randrange(256)
        if random_bytes.random() < 0.2:
            del mutated[random_bytes.randrange(len(mutated)) :]
        path = tmp_path / f"fuzz.{kind}"
        path.write_bytes(mutated)
        try:
            source = open_captions(path, tmp_path)
            for number in range(min(len(source), 10)):
                try:
                    outcomes["good"] += isinstance(source[number], Sample)
                except DataError:
                    outcomes["bad record"] += 1
        except DataError:
            outcomes["bad file"] += 1
    assert outcomes["good"] > 50
    assert outcomes["bad file"] + outcomes["bad record"] > 20
