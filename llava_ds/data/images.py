"""From an image to ``pixel_values``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llava_ds.data.decode import decode_pil, decode_rgb, open_pil
from llava_ds.errors import DataError
from llava_ds.ops.normalise import normalise_levels
from llava_ds.schema import StoredImage

# What a picture may become on its way, before the crop: 0.8 GB of RGB.
_MAX_PIXELS = 2**28


IMAGE_REASONS = (
    "image file is missing", "image cannot be read", "image does not decode", "image is too far from a square",
)
"""``reason`` of the errors about a picture."""


@dataclass(frozen=True)
class ImageTransform:
    """Resizes and normalises as CLIP does, within 2 of 255 levels of its official geometry in PIL.

    ``square`` scales the shorter edge to ``image_size`` and crops the centre (LLaVA v1); ``pad`` first pads to a
    square with the mean colour (LLaVA-1.5).
    """

    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    aspect: str
    interpolation: str

    @classmethod
    def for_tower(cls, spec: Any, aspect: str) -> ImageTransform:
        """The transform that a tower's ``TowerSpec`` asks for."""
        return cls(spec.image_size, spec.image_mean, spec.image_std, aspect, spec.interpolation)

    def __call__(self, image: str | Path | StoredImage) -> torch.Tensor:
        """[3, H, W] float32 of an image. Raises DataError that names it when it is missing, not decoded or unfit."""
        return normalise_levels(self.levels(image), self.image_mean, self.image_std)

    def levels(self, image: str | Path | StoredImage) -> torch.Tensor:
        """As a call, but before the normalisation: [3, H, W] uint8, channels last in memory."""
        with _naming(image):
            rgb = decode_rgb(_read(image))
        try:
            return self._levels(rgb)
        except DataError as error:
            raise DataError(f"image {_name(image)}: {error}", reason=error.reason) from error

    def from_image(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W] of an RGB image. Raises DataError when its shape is so far from a square that it will not fit."""
        return normalise_levels(self._levels(torch.from_numpy(np.array(image))), self.image_mean, self.image_std)

    def _levels(self, rgb: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] uint8 -> [3, image_size, image_size] uint8."""
        height, width = rgb.shape[:2]
        num_rows, num_columns = scaled_size(width, height, self.image_size, self.aspect)
        if self.aspect == "pad":
            height = width = max(height, width)
        if height > 2 * width and num_rows < height:  # Pillow 13's order for tall pictures
            rgb = self._resized(rgb, num_rows, width)
            height = num_rows
        # Columns first, as PIL: bars above and below may then wait until the rows are short.
        rgb = self._resized(self._padded(rgb, rgb.shape[0], width), rgb.shape[0], num_columns)
        rgb = self._resized(self._padded(rgb, height, num_columns), num_rows, num_columns)
        top, left = (num_rows - self.image_size) // 2, (num_columns - self.image_size) // 2
        return rgb[top : top + self.image_size, left : left + self.image_size].permute(2, 0, 1)

    def _padded(self, rgb: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """``rgb`` in the middle of ``height`` x ``width`` pixels of the mean colour."""
        if rgb.shape[:2] == (height, width):
            return rgb
        colour = bytearray(int(mean * 255) for mean in self.image_mean)
        row = torch.frombuffer(colour * width, dtype=torch.uint8)
        canvas = row.expand(height, -1).contiguous().view(height, width, 3)
        top, left = (height - rgb.shape[0]) // 2, (width - rgb.shape[1]) // 2
        canvas[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
        return canvas

    def _resized(self, rgb: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """On uint8, as PIL: in float nothing would be clipped between rows and columns."""
        batch = rgb[None].permute(0, 3, 1, 2)  # this order of operations keeps torch's fast path for channels last
        return F.interpolate(batch, (height, width), mode=self.interpolation, antialias=True)[0].permute(1, 2, 0)


def scaled_size(width: int, height: int, image_size: int, aspect: str) -> tuple[int, int]:
    """Rows and columns before the crop. Raises DataError when a picture of that shape does not fit into memory."""
    given = f"{width}x{height}"
    if aspect == "pad":
        height = width = max(height, width)
    # In this order, as transformers: int(width * (image_size / short)) is one pixel less for some pictures.
    short = min(height, width)
    rows, columns = int(image_size * height / short), int(image_size * width / short)
    for size in ((width, height) if aspect == "pad" else (0, 0), (columns, rows)):
        if size[0] * size[1] > _MAX_PIXELS:
            raise DataError(
                f"{given} pixels would become {size[0]}x{size[1]}, more than {_MAX_PIXELS} in all; crop the picture or "
                "drop its record",
                reason="image is too far from a square",
            )
    return rows, columns


def open_image(image: str | Path | StoredImage) -> Image.Image:
    """The image as RGB. Raises DataError that names it when it is missing or does not decode."""
    with _naming(image):
        return decode_pil(_read(image))


def check_image_header(image: str | Path | StoredImage) -> None:
    """Raises DataError that names the image when it is missing or does not begin as a picture; decodes nothing."""
    with _naming(image), open_pil(io.BytesIO(image.read()) if isinstance(image, StoredImage) else Path(image)):
        pass


def _read(image: str | Path | StoredImage) -> bytes:
    return image.read() if isinstance(image, StoredImage) else Path(image).read_bytes()


def _name(image: str | Path | StoredImage) -> str:
    return image.name if isinstance(image, StoredImage) else str(image)


@contextmanager
def _naming(image: str | Path | StoredImage) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"image {_name(image)}: no such file; fix the path, or the image root before it",
            reason="image file is missing",
        ) from error
    except MemoryError:
        raise
    except DataError as error:  # of the archive that a stored image is in
        raise DataError(f"image {_name(image)}: {error}", reason=error.reason) from error
    except OSError as error:
        if error.errno is None:  # PIL's own, about what is in the file
            raise _undecodable(image, error) from error
        raise DataError(
            f"image {_name(image)} cannot be read: {error}; see that the file can be opened, and try again",
            reason="image cannot be read",
        ) from error
    except Exception as error:  # PIL's plugins raise whatever their parsing ran into
        raise _undecodable(image, error) from error


def _undecodable(image: str | Path | StoredImage, error: Exception) -> DataError:
    return DataError(
        f"image {_name(image)} does not decode: {type(error).__name__}: {error}; replace the file or drop its record",
        reason="image does not decode",
    )
