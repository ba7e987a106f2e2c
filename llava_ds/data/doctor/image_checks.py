"""What is wrong or unusual about one picture: decoded in full once, as training will."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from llava_ds.data.images import open_image, scaled_size
from llava_ds.errors import DataError
from llava_ds.schema import StoredImage

HUGE_PIXELS = 25_000_000
TINY_SIDE = 8
MAX_ASPECT = 8
_USUAL_PIXELS = 640 * 480
_IMAGE_SIZE = 336  # of CLIP ViT-L/14 at its larger size
_ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright
_MISSING = "image file is missing"  # the reason of open_image


def check_image(image: str | StoredImage) -> list[tuple[str, str]]:
    """Name and message of everything found (see findings.py); an image that fails gives nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of what is reported here
        try:
            data = image.read() if isinstance(image, StoredImage) else Path(image).read_bytes()
        except Exception:  # open_image below meets the same error, and words it
            data = None
        try:
            opened = open_image(image if data is None else StoredImage(_name(image), lambda: data))
        except DataError as error:
            return [("image_missing" if error.reason == _MISSING else "image_does_not_decode", str(error))]
        for aspect in ("square", "pad"):
            try:
                scaled_size(*opened.size, _IMAGE_SIZE, aspect)
            except DataError as error:
                message = f"image {_name(image)}: with data.image_aspect_ratio={aspect} at {_IMAGE_SIZE} px: {error}"
                return [("image_unfit", message)]
        return [(name, f"image {_name(image)}: {message}") for name, message in _oddities(data or b"")]


def _oddities(data: bytes) -> Iterator[tuple[str, str]]:
    """Of a picture that decodes."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            yield from _odd_size(*picture.size)
            yield from _odd_pixels(picture)
    except Exception as error:  # the first frame is good, or this would not be asked
        yield "image_partly_damaged", f"it decodes, but the file is damaged elsewhere: {type(error).__name__}: {error}"


def _odd_size(width: int, height: int) -> Iterator[tuple[str, str]]:
    num_pixels, size = width * height, f"{width}x{height}"
    if num_pixels > HUGE_PIXELS:
        limit = Image.MAX_IMAGE_PIXELS or 0
        bomb = "; PIL takes it for a decompression bomb, and refuses twice its limit" if num_pixels > limit > 0 else ""
        yield "image_huge", (
            f"{size}, {num_pixels / 1e6:.0f} megapixels: decoding takes about {num_pixels // _USUAL_PIXELS} times as "
            f"long as 640x480{bomb}; scale it down once"
        )
    if min(width, height) < TINY_SIDE:
        yield "image_tiny", f"{size} pixels; is it the picture that was meant?"
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield "image_elongated", (
            f"{size}: a centre crop keeps {min(width, height) / max(width, height):.1%} of it, and of a padded square "
            "it fills as much"
        )


def _odd_pixels(picture: Any) -> Iterator[tuple[str, str]]:
    # An MPO is a JPEG with previews behind it, as cameras write; its first picture is the one meant.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        yield "image_animated", f"{picture.format} of several frames; the first is used"
    if picture.mode[0] in "IF":
        yield "image_16_bit", f"mode {picture.mode}; every value above 255 becomes white: convert it to 8 bits"
    elif any(";16" in str(tile[3]) for tile in picture.tile):
        yield "image_16_bit", "16 bits a channel, of which the upper 8 are used"
    if picture.mode == "CMYK":
        yield "image_cmyk", "CMYK; colours may come out wrong: convert it to RGB"
    orientation = picture.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        yield "image_rotated", f"EXIF orientation {orientation} is not applied: the model sees it turned or mirrored"


def _name(image: str | StoredImage) -> str:
    return image.name if isinstance(image, StoredImage) else image
