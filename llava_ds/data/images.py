"""From an image file to ``pixel_values``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_ds.errors import DataError

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# 1 GiB, as PIL holds RGB in 4 bytes: what a picture may become on its way, before the crop.
_MAX_PIXELS = 2**28


@dataclass(frozen=True)
class ImageTransform:
    """Resizes and normalises as CLIP does.

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

    def __call__(self, path: Path) -> torch.Tensor:
        """[3, H, W] of an image file. Raises DataError that names the file when it does not decode or fit."""
        image = open_image(path)
        try:
            return self.from_image(image)
        except DataError as error:
            raise DataError(f"image {path}: {error}") from error

    def from_image(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W] of an RGB image. Raises DataError when its shape is so far from a square that it will not fit."""
        if self.aspect == "pad":
            image = self._padded(image)
        # In this order, as transformers: int(width * (image_size / short)) is one pixel less for some pictures.
        width, height = image.size
        short = min(width, height)
        size = int(self.image_size * width / short), int(self.image_size * height / short)
        _check_fits(image.size, size)
        image = image.resize(size, _RESAMPLE[self.interpolation])
        left, top = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)  # [H, W, 3]
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return ((pixels - mean) / std).permute(2, 0, 1).contiguous()

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        _check_fits(image.size, (side, side))
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def _check_fits(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    if wanted[0] * wanted[1] > _MAX_PIXELS:
        raise DataError(
            f"{given[0]}x{given[1]} pixels would become {wanted[0]}x{wanted[1]}, more than {_MAX_PIXELS} in all; "
            "crop the picture or drop its record"
        )


def open_image(path: Path) -> Image.Image:
    """The file as RGB. Raises DataError that names it when it is missing or does not decode."""
    with _naming(path), Image.open(path) as image:
        return image.convert("RGB")


def check_image_header(path: Path) -> None:
    """Raises DataError that names the file when it is missing or does not begin as a picture; decodes nothing."""
    with _naming(path), Image.open(path):
        pass


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"image {path}: no such file; fix the path, or the image root before it", reason="image file is missing"
        ) from error
    except Exception as error:  # PIL's plugins raise whatever their parsing ran into
        raise DataError(
            f"image {path} does not decode: {type(error).__name__}: {error}; replace the file or drop its record",
            reason="image does not decode",
        ) from error
