"""Several views of one picture: the same thing at another place, size, side and angle."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageOps


def draw_views(picture: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Suffix and picture of each view of a square picture, itself first (with an empty suffix)."""
    size = picture.width
    mirrored = ImageOps.mirror(picture)
    yield "", picture
    yield "-small", _on_canvas(mirrored, size * 3 // 4, (size // 8, size // 8))
    yield "-low", _on_canvas(_rotated(picture, 12), size * 7 // 8, (0, size // 8))
    yield "-tilted", _rotated(mirrored, -10)


def _rotated(picture: Image.Image, degrees: float) -> Image.Image:
    return picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor="white")


def _on_canvas(picture: Image.Image, side: int, corner: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), corner)
    return canvas
