"""Several views of one picture: the same thing at another place, size, side and angle, and in other colours."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def draw_views(picture: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Suffix and picture of each view of a square picture, itself first (with an empty suffix)."""
    size = picture.width
    seven_eighths = size * 7 // 8
    mirrored = ImageOps.mirror(picture)
    pale = ImageEnhance.Brightness(ImageEnhance.Color(mirrored).enhance(0.6)).enhance(0.9)
    yield "", picture
    yield "-small", _on_white(mirrored, size * 3 // 4, (size // 8, size // 8))
    yield "-low", _on_white(_rotated(picture, 12), seven_eighths, (0, size // 8))
    yield "-tilted", _rotated(mirrored, -10)
    yield "-bright", _on_white(ImageEnhance.Color(picture).enhance(1.5), seven_eighths, (size // 8, 0))
    yield "-pale", _on_white(pale, seven_eighths, (size // 16, size // 16))
    yield "-blurred", _rotated(picture, -20).filter(ImageFilter.GaussianBlur(1))
    yield "-near", _near(mirrored, size * 9 // 8)


def _rotated(picture: Image.Image, degrees: float) -> Image.Image:
    return picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor="white")


def _on_white(picture: Image.Image, side: int, corner: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), corner)
    return canvas


def _near(picture: Image.Image, side: int) -> Image.Image:
    edge = (side - picture.width) // 2
    box = (edge, edge, edge + picture.width, edge + picture.width)
    return picture.resize((side, side), Image.Resampling.LANCZOS).crop(box)
