"""Pictures as levels of 0 to 255, until the device that needs them normalised does that."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def normalise_levels(levels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """[..., 3, H, W] uint8 in any memory layout -> float32, contiguous: (level / 255 - mean) / std of each channel.

    A batch of levels is a quarter of the bytes to copy between processes and to the device.
    """
    pixels = levels.to(torch.float32, memory_format=torch.contiguous_format)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        pixels[..., channel, :, :].sub_(255 * m).mul_(1 / (255 * s))
    return pixels
