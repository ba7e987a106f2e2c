"""Pixel values against transformers' CLIPImageProcessor, and pictures that cannot become any."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_ds.data.images import ImageTransform, open_image
from llava_ds.errors import DataError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Bit-equal with transformers 5.24 and Pillow 13. Four times the spacing of fp32 at the largest value (2.1) is left for
# builds that round /255, - mean, / std otherwise; a pixel that is off by one level is off by 0.014.
TOLERANCE = 1e-6
SIZES = [(330, 240), (240, 330), (50, 44), (640, 480), (99, 1000), (1000, 99), (336, 336), (7, 5), (1023, 337)]


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


def _assert_same(ours: torch.Tensor, official: torch.Tensor) -> None:
    assert ours.shape == official.shape
    assert ours.std() > 0.1
    assert (ours - official).abs().max() < TOLERANCE


@pytest.mark.parametrize("image_size", [224, 336])
@pytest.mark.parametrize("size", SIZES)
def test_square_is_clips_own_geometry(size, image_size):
    image = _noise(size, 3)
    _assert_same(_transform("square", image_size).from_image(image), _official(image, image_size))


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_llavas_expansion_to_a_square(size):
    image = _noise(size, 3)
    _assert_same(_transform("pad").from_image(image), _official(_expanded(image)))


@pytest.mark.parametrize(
    "image", [_noise((61, 45)), _noise((61, 45), 4), _noise((61, 45), dtype=np.uint16)], ids=["grey", "rgba", "16-bit"]
)
def test_every_mode_is_what_llava_makes_of_it(tmp_path, image):
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:  # LLaVA converts before the processor sees the picture
        assert opened.mode == image.mode != "RGB"
        official = _official(opened.convert("RGB"))
    ours = _transform()(tmp_path / "a.png")
    assert ours.shape == official.shape
    assert (ours - official).abs().max() < TOLERANCE


def test_every_ordinary_size_gets_the_official_edge(monkeypatch):
    class Resized(Exception):
        pass

    def stop(_, size, *__, **___):
        raise Resized(*size)

    monkeypatch.setattr(Image.Image, "resize", stop)
    num_naive = 0
    for height in range(200, 300, 5):
        for width in range(height, 700, 5):
            with pytest.raises(Resized) as caught:
                _transform().from_image(Image.new("RGB", (width, height)))
            assert caught.value.args == (int(336 * width / height), 336)
            num_naive += int(width * (336 / height)) != int(336 * width / height)
    assert num_naive > 0  # some of these sizes tell the two formulas apart


@pytest.mark.parametrize(("aspect", "size"), [("square", (4000, 1)), ("square", (1, 4000)), ("pad", (20000, 3))])
def test_an_absurd_shape_is_refused_before_it_takes_gigabytes(tmp_path, aspect, size):
    Image.new("RGB", size).save(tmp_path / "line.png")
    with pytest.raises(DataError, match=f"{size[0]}x{size[1]} pixels would become") as caught:
        _transform(aspect)(tmp_path / "line.png")
    assert str(tmp_path / "line.png") in str(caught.value)


def test_a_long_picture_still_fits():
    assert _transform().from_image(_noise((1000, 10), 3)).shape == (3, 336, 336)


def _dds_of_an_unknown_format() -> bytes:
    """A DirectDraw surface whose pixel format no decoder knows: PIL raises NotImplementedError, not an OSError."""
    size, four_cc_flag, pixel_format = 124, 0x4, b"ABCD"
    header = struct.pack("<7I44x2I4s5I5I", size, 0x1007, 4, 4, 0, 0, 0, 32, four_cc_flag, pixel_format, *[0] * 10)
    return b"DDS " + header + bytes(64)


def _cut_png() -> bytes:
    file = io.BytesIO()
    _noise((40, 40), 3).save(file, "png")
    return file.getvalue()[:1000]


@pytest.mark.parametrize("content", [_dds_of_an_unknown_format(), _cut_png(), b"no picture", b""])
def test_what_does_not_decode_is_named_whatever_pil_raises(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="a.png does not decode: ") as caught:
        open_image(tmp_path / "a.png")
    assert caught.value.reason == "image does not decode"


def test_the_unknown_format_is_no_error_that_pictures_usually_give(tmp_path):
    (tmp_path / "a.dds").write_bytes(_dds_of_an_unknown_format())
    with pytest.raises(NotImplementedError):
        Image.open(tmp_path / "a.dds").load()


def test_a_missing_file_says_so():
    with pytest.raises(DataError, match="no such file"):
        open_image(Path("nowhere.png"))
