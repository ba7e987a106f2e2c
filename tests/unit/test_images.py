"""Pixel values against transformers' CLIPImageProcessor, and pictures that cannot become any."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_ds.data import decode
from llava_ds.data.images import ImageTransform, check_image_header, open_image
from llava_ds.errors import DataError
from llava_ds.schema import StoredImage

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Of 255, before normalisation. PIL and torch weigh pixels in integers of different width, so each of the two passes may
# round up where the other rounds down: measured 2 at most, in one value of 10,000 on black and white noise (torch 2.14
# with and without AVX, Pillow 13). The rest is fp32. A picture shifted by a pixel is off by a hundred.
MAX_LEVELS = 2.001
SIZES = [
    (330, 240), (240, 330), (50, 44), (640, 480), (99, 1000), (1000, 99), (336, 336), (7, 5), (1023, 337),
    (1, 1), (1, 2), (2, 1), (337, 336), (336, 335), (30, 1), (224, 224), (333, 500), (400, 800), (400, 801), (400, 900),
    (444, 1142), (900, 400), (350, 2000), (40, 1000),
]  # fmt: skip


def _transform(aspect: str = "square", image_size: int = 336) -> ImageTransform:
    return ImageTransform(image_size, MEAN, STD, aspect, "bicubic")


def _official(image: Image.Image, image_size: int = 336) -> torch.Tensor:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size},
        image_mean=MEAN, image_std=STD,
    )
    return torch.as_tensor(np.array(processor(image)["pixel_values"][0]))


def _expanded(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square."""
    width, height = image.size
    colour = tuple(int(mean * 255) for mean in MEAN)
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return square


def _noise(size: tuple[int, int], *channels: int, dtype=np.uint8) -> Image.Image:
    rng = np.random.default_rng(size)
    return Image.fromarray(rng.integers(0, np.iinfo(dtype).max, (size[1], size[0], *channels), dtype=dtype))


def _black_and_white(size: tuple[int, int]) -> Image.Image:
    """Every resized value overshoots, so it matters when it is clipped."""
    return Image.fromarray((np.asarray(_noise(size, 3)) > 127).astype(np.uint8) * 255)


def _photo(size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth, so that a JPEG of it is near it."""
    return _noise((size[0] // 8, size[1] // 8), 3).resize(size, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _assert_same(ours: torch.Tensor, official: torch.Tensor) -> None:
    assert ours.shape == official.shape
    assert ours.dtype == official.dtype == torch.float32
    assert ours.is_contiguous()
    levels = (ours - official) * torch.tensor(STD)[:, None, None] * 255
    assert levels.abs().max() < MAX_LEVELS
    assert levels.abs().mean() < 0.5


@pytest.mark.parametrize("image_size", [224, 336])
@pytest.mark.parametrize("size", SIZES)
def test_square_is_clips_own_geometry(size, image_size):
    for image in (_noise(size, 3), _black_and_white(size)):
        _assert_same(_transform("square", image_size).from_image(image), _official(image, image_size))


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_llavas_expansion_to_a_square(size):
    for image in (_noise(size, 3), _black_and_white(size)):
        _assert_same(_transform("pad").from_image(image), _official(_expanded(image)))


@pytest.mark.parametrize("size", [(336, 336), (500, 336), (336, 500)])
def test_a_picture_of_the_right_size_is_only_normalised(size):
    """To the rounding of fp32: four times its spacing at the largest value, 2.1."""
    image = _noise(size, 3)
    assert (_transform().from_image(image) - _official(image)).abs().max() < 1e-6


def test_bilinear_is_pils():
    image = _noise((640, 480), 3)
    ours = ImageTransform(336, (0, 0, 0), (1, 1, 1), "square", "bilinear").from_image(image)
    official = np.asarray(image.resize((448, 336), Image.Resampling.BILINEAR).crop((56, 0, 392, 336)))
    assert (255 * ours.permute(1, 2, 0) - torch.tensor(official)).abs().max() < MAX_LEVELS


def test_the_mean_colour_of_the_bars_is_rounded_down():
    ours = _transform("pad").from_image(_noise((30, 10), 3))
    colour = torch.tensor([int(mean * 255) / 255 for mean in MEAN])
    expected = (colour - torch.tensor(MEAN)) / torch.tensor(STD)
    assert (ours[:, [0, -1]] - expected[:, None, None]).abs().max() < 1e-6


KINDS = {
    "grey.png": lambda: _encoded(_noise((61, 45)), "png"),
    "rgba.png": lambda: _encoded(_noise((61, 45), 4), "png"),
    "16-bit.png": lambda: _encoded(_noise((61, 45), dtype=np.uint16), "png"),
    "palette.png": lambda: _encoded(_photo().convert("P"), "png"),
    "black-and-white.png": lambda: _encoded(_noise((61, 45)).convert("1"), "png"),
    "cmyk.jpg": lambda: _encoded(_photo().convert("CMYK"), "jpeg"),
    "two_frames.gif": lambda: _encoded(
        _photo().convert("P"), "gif", save_all=True, append_images=[Image.new("P", (160, 120))]
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_mode_is_what_llava_makes_of_it(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name]())
    with Image.open(tmp_path / name) as opened:  # LLaVA converts before the processor sees the picture
        assert opened.mode != "RGB"
        official = _official(opened.convert("RGB"))
    _assert_same(_transform()(tmp_path / name), official)


def test_cmyk_is_pils_own_conversion(monkeypatch):
    monkeypatch.delattr(decode, "decode_jpeg")
    ours = decode.decode_rgb(KINDS["cmyk.jpg"]())
    with Image.open(io.BytesIO(KINDS["cmyk.jpg"]())) as image:
        assert image.mode == "CMYK"
        assert np.array_equal(ours, image.convert("RGB"))


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_webp(tmp_path):
    (tmp_path / "a.jpg").write_bytes(_encoded(_photo(), "webp"))  # the name says nothing
    _assert_same(_transform()(tmp_path / "a.jpg"), _official(open_image(tmp_path / "a.jpg")))


def _with_thumbnail() -> bytes:
    """A whole JPEG in a segment before the picture's own data."""
    picture, thumbnail = _encoded(_photo(), "jpeg"), _encoded(_photo((16, 16)), "jpeg")
    return picture[:2] + b"\xff\xe5" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + picture[2:]


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by a quarter to view
    return _encoded(_photo(), "jpeg", exif=exif)


JPEGS: dict[str, Callable[[], bytes]] = {
    "4:4:4": lambda: _encoded(_photo(), "jpeg", subsampling=0, quality=95),
    "4:2:2": lambda: _encoded(_photo(), "jpeg", subsampling=1),
    "4:2:0": lambda: _encoded(_photo(), "jpeg", subsampling=2),
    "odd size": lambda: _encoded(_photo((161, 97)), "jpeg"),
    "one pixel": lambda: _encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "jpeg"),
    "grey": lambda: _encoded(_photo().convert("L"), "jpeg"),
    "progressive": lambda: _encoded(_photo(), "jpeg", progressive=True),
    "restart markers": lambda: _encoded(_photo(), "jpeg", restart_marker_blocks=3),
    "no conversion to YCbCr": lambda: _encoded(_photo(), "jpeg", keep_rgb=True),
    "fill bytes": lambda: _encoded(_photo(), "jpeg").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    "bytes after the end": lambda: _encoded(_photo(), "jpeg") + b"more" * 100,
    "several pictures": lambda: _encoded(_photo(), "mpo", save_all=True, append_images=[Image.new("RGB", (80, 60))]),
    "thumbnail": _with_thumbnail,
    "rotated by EXIF": _rotated,
}


@pytest.mark.parametrize("name", JPEGS)
def test_the_fast_decoder_gives_pils_pixels(monkeypatch, name):
    data = JPEGS[name]()
    with Image.open(io.BytesIO(data)) as image:
        pils = np.asarray(image.convert("RGB"))
    monkeypatch.delattr(decode, "decode_pil")
    ours = decode.decode_rgb(data)
    assert ours.shape == pils.shape  # so no EXIF rotation: LLaVA applies none
    # Equal where both link libjpeg-turbo; two levels for a build with another DCT.
    assert (ours.int() - torch.tensor(pils).int()).abs().max() <= 2


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_a_path_a_str_and_a_stored_image_give_the_same(tmp_path, aspect):
    file, num_read = tmp_path / "a.jpg", 0
    file.write_bytes(_rotated())

    def read() -> bytes:
        nonlocal num_read
        num_read += 1
        return file.read_bytes()

    transform, stored = _transform(aspect), StoredImage("shard.tar/a.jpg", read)
    ours = transform(stored)
    assert num_read == 1
    assert ours.equal(transform(file)) and ours.equal(transform(str(file)))
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    _assert_same(ours, _official(_expanded(image) if aspect == "pad" else image))
    for given in (file, str(file), stored):
        check_image_header(given)
        assert np.array_equal(open_image(given), image)


def test_every_ordinary_size_gets_the_official_edge(monkeypatch):
    class Resized(Exception):
        pass

    def stop(self, rgb, height, width):
        raise Resized(height, width)

    monkeypatch.setattr(ImageTransform, "_resized", stop)
    num_naive = 0
    for height in range(200, 300, 5):
        for width in range(height, 700, 5):
            with pytest.raises(Resized) as caught:
                _transform().from_image(Image.new("RGB", (width, height)))
            assert caught.value.args == (height, int(336 * width / height))
            num_naive += int(width * (336 / height)) != int(336 * width / height)
    assert num_naive > 0  # some of these sizes tell the two formulas apart


@pytest.mark.parametrize(("aspect", "size"), [("square", (4000, 1)), ("square", (1, 4000)), ("pad", (20000, 3))])
def test_an_absurd_shape_is_refused_before_it_takes_gigabytes(tmp_path, aspect, size):
    Image.new("RGB", size).save(tmp_path / "line.png")
    with pytest.raises(DataError, match=f"{size[0]}x{size[1]} pixels would become") as caught:
        _transform(aspect)(tmp_path / "line.png")
    assert str(tmp_path / "line.png") in str(caught.value)
    assert caught.value.reason == "image is too far from a square"


def test_a_long_picture_still_fits():
    assert _transform().from_image(_noise((1000, 10), 3)).shape == (3, 336, 336)


def _dds_of_an_unknown_format() -> bytes:
    """A DirectDraw surface whose pixel format no decoder knows: PIL raises NotImplementedError, not an OSError."""
    size, four_cc_flag, pixel_format = 124, 0x4, b"ABCD"
    header = struct.pack("<7I44x2I4s5I5I", size, 0x1007, 4, 4, 0, 0, 0, 32, four_cc_flag, pixel_format, *[0] * 10)
    return b"DDS " + header + bytes(64)


def _huge_jpeg() -> bytes:
    """A small JPEG that says it is of 65000x65000 pixels."""
    data = bytearray(_encoded(_photo(), "jpeg"))
    frame = data.index(b"\xff\xc0\x00\x11\x08")
    data[frame + 5 : frame + 9] = struct.pack(">2H", 65000, 65000)
    return bytes(data)


def _huge_png() -> bytes:
    """A small PNG that says it is of 65000x65000 pixels."""
    data = bytearray(_encoded(_photo(), "png"))
    data[16:24] = struct.pack(">2I", 65000, 65000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


BROKEN: dict[str, Callable[[], bytes]] = {
    "unknown pixel format": _dds_of_an_unknown_format,
    "cut PNG": lambda: _encoded(_noise((40, 40), 3), "png")[:1000],
    "no picture": lambda: b"no picture",
    "empty": lambda: b"",
    "only the first bytes of a JPEG": lambda: b"\xff\xd8\xff",
    "JPEG without a scan": lambda: _encoded(_photo(), "jpeg")[:300] + b"\xff\xd9",
    "huge JPEG": _huge_jpeg,
    "huge PNG": _huge_png,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("load", [_transform(), open_image], ids=["transform", "open_image"])
def test_what_does_not_decode_is_named_whatever_pil_raises(tmp_path, monkeypatch, load, name):
    content = BROKEN[name]()
    (tmp_path / "a.png").write_bytes(content)
    if name == "huge JPEG":
        monkeypatch.delattr(decode, "decode_jpeg")  # which would take 12 GB
    for image in (tmp_path / "a.png", StoredImage("shard.tar/a.png", lambda: content)):
        with pytest.raises(DataError, match="a.png does not decode: ") as caught:
            load(image)
        assert caught.value.reason == "image does not decode"
        assert str(getattr(image, "name", image)) in str(caught.value)
        assert "0x" not in str(caught.value)  # no address of a buffer
        assert ("DecompressionBombError" in str(caught.value)) == name.startswith("huge")


CUT = {
    "baseline": lambda: _encoded(_photo(), "jpeg"),
    "progressive": JPEGS["progressive"],
    "grey": JPEGS["grey"],
    "cmyk": KINDS["cmyk.jpg"],
    "thumbnail": _with_thumbnail,
    "png": lambda: _encoded(_photo(), "png"),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("tail", [b"", bytes(3000), b"\xff" * 3000, b"<html>" * 100], ids=["", "zeros", "ones", "text"])
def test_a_picture_that_was_cut_is_refused_wherever_and_whatever_follows(name, tail):
    data = CUT[name]()
    transform, num_cuts = _transform(image_size=14), 0
    transform(StoredImage("whole", lambda: data))
    for length in [*range(3, len(data), len(data) // 25), *range(len(data) - 9, len(data))]:
        cut = data[:length] + tail
        if cut.startswith(data):
            continue  # the tail begins with what was cut
        for load in (transform, open_image):
            with pytest.raises(DataError, match="shard.tar/a.jpg does not decode: ") as caught:
                load(StoredImage("shard.tar/a.jpg", lambda cut=cut: cut))
            assert caught.value.reason == "image does not decode"
        num_cuts += 1
    assert num_cuts > 30


def test_the_unknown_format_is_no_error_that_pictures_usually_give(tmp_path):
    (tmp_path / "a.dds").write_bytes(_dds_of_an_unknown_format())
    with pytest.raises(NotImplementedError):
        Image.open(tmp_path / "a.dds").load()


def test_pil_accepts_what_lost_its_end_to_zeros():
    """So that our own check is needed."""
    data = _encoded(_photo(), "png")
    with Image.open(io.BytesIO(data[: len(data) // 2] + bytes(len(data)))) as image:
        assert not np.asarray(image)[-1].any()


@pytest.mark.parametrize("load", [_transform(), open_image, check_image_header])
def test_a_missing_file_says_so(tmp_path, load):
    def read() -> bytes:
        return (tmp_path / "nowhere.tar").read_bytes()

    for image in (Path("nowhere.png"), "nowhere.png", StoredImage("nowhere.tar/0.png", read)):
        with pytest.raises(DataError, match="image nowhere.*: no such file") as caught:
            load(image)
        assert caught.value.reason == "image file is missing"


@pytest.mark.parametrize("load", [_transform(), open_image, check_image_header])
def test_what_a_store_raises_is_named(load):
    def raises(error: Exception) -> StoredImage:
        def read() -> bytes:
            raise error

        return StoredImage("table[3]", read)

    with pytest.raises(DataError, match="image table.3. does not decode: KeyError: 'jpg'"):
        load(raises(KeyError("jpg")))
    with pytest.raises(DataError, match="image table.3.: shard 7 is cut") as caught:
        load(raises(DataError("shard 7 is cut", reason="shard is cut")))
    assert caught.value.reason == "shard is cut"


def test_a_header_check_reads_no_pixels(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(_encoded(_photo(), "jpeg")[:700])
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    check_image_header(tmp_path / "cut.jpg")
    for image in (tmp_path / "text.jpg", StoredImage("text.jpg", lambda: b"no picture")):
        with pytest.raises(DataError, match="text.jpg does not decode: ") as caught:
            check_image_header(image)
        assert caught.value.reason == "image does not decode"
        assert "0x" not in str(caught.value)
