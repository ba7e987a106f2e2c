"""Which images get which kinds of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_ds.datagen.kinds import KINDS, Kind
from llava_ds.datagen.records import AnnotatedImage
from llava_ds.errors import ConfigError

PAPER_MIX = {kind.name: kind.share for kind in KINDS.values()}
"""Shares of the paper's 158 thousand samples."""


@dataclass(frozen=True)
class PlannedSample:
    """One sample that shall be written: an image and a kind."""

    image: AnnotatedImage
    kind: Kind

    @property
    def id(self) -> str:
        """The image's id and the kind: ``000000033471-detail``."""
        return f"{self.image.id}-{self.kind.name}"


def parse_mix(text: str) -> dict[str, int]:
    """Shares by kind of ``58:23:77`` (conversation, detail, complex). Raises ConfigError."""
    parts = text.split(":")
    if len(parts) != len(KINDS) or not all(part.isdecimal() for part in parts) or not any(map(int, parts)):
        raise ConfigError(
            f"the mix {text!r} must be {len(KINDS)} whole numbers, not all 0, for {':'.join(KINDS)}, such as "
            f"{':'.join(map(str, PAPER_MIX.values()))}"
        )
    return dict(zip(KINDS, map(int, parts), strict=True))


def plan_samples(
    images: Sequence[AnnotatedImage], mix: Mapping[str, int], num_samples: int | None, seed: int
) -> list[PlannedSample]:
    """``num_samples`` samples in the shares of ``mix``, in the order of the images.

    An image gets a kind at most once: it has a place in the line for each kind, a hash of (seed, kind, image id), and
    as many as the kind's count are taken from the front. Without ``num_samples`` the kind of the largest share takes
    every image.
    Raises ConfigError when more are asked than there are images for a kind.
    """
    largest = max(mix.values())
    most = len(images) * sum(mix.values()) // largest
    counts = share_out(most if num_samples is None else num_samples, mix)
    short = [f"{count} of {name}" for name, count in counts.items() if count > len(images)]
    if short:
        raise ConfigError(
            f"{num_samples} samples would take {', '.join(short)}, and there are {len(images)} images, each for one of "
            f"a kind; ask for at most {most} in this mix, or give more images"
        )
    chosen = {name: _first_in_line(images, name, count, seed) for name, count in counts.items()}
    return [PlannedSample(i, KINDS[name]) for i in images for name in KINDS if i.id in chosen.get(name, ())]


def share_out(total: int, shares: Mapping[str, int]) -> dict[str, int]:
    """``total`` in proportion to ``shares``, by Webster's method (the first wins a tie): exact where that is possible.

    One after the other goes to whoever is furthest behind, so no count shrinks when ``total`` grows.
    """
    whole, start = sum(shares.values()), max(total - len(shares), 0)
    # Rounded shares of a little less are where that order passes by: the last few are left to hand out.
    counts = {name: -((whole - 2 * start * share) // (2 * whole)) for name, share in shares.items()}
    for _ in range(total - sum(counts.values())):
        counts[max(shares, key=lambda name: shares[name] / (2 * counts[name] + 1))] += 1
    return counts


def _first_in_line(images: Sequence[AnnotatedImage], kind: str, count: int, seed: int) -> set[str]:
    def place(image_id: str) -> bytes:
        return hashlib.sha256(f"{seed}|{kind}|{image_id}".encode()).digest()

    return set(sorted((image.id for image in images), key=place)[:count])
