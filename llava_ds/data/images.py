"""From an image file to ``pixel_values``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_ds.errors import DataError

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


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
        """[3, H, W] of an image file. Raises DataError that names the file when it does not decode."""
        return self.from_image(open_image(path))

    def from_image(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W] of an RGB image."""
        if self.aspect == "pad":
            image = self._padded(image)
        width, height = image.size
        scale = self.image_size / min(width, height)
        size = max(self.image_size, int(width * scale)), max(self.image_size, int(height * scale))
        image = image.resize(size, _RESAMPLE[self.interpolation])
        left, top = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)  # [H, W, 3]
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return ((pixels - mean) / std).permute(2, 0, 1).contiguous()

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def open_image(path: Path) -> Image.Image:
    """The file as RGB. Raises DataError that names it when it is missing or does not decode."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"image {path}: no such file; fix the path, or the image root before it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL has no common error
        raise DataError(f"image {path} does not decode: {error}; replace the file or drop its record") from error
