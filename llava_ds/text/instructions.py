"""Instructions that ask for a description of an image, and the draw of one for a sample.

The lists are those of the paper (arXiv 2304.08485): brief ones from Table 11, detailed ones from Table 12.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

BRIEF_INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""Ask for a caption: stage 1 expands image-caption pairs with them."""

DETAILED_INSTRUCTIONS = (
    "Describe the following image in detail",
    "Provide a detailed description of the given image",
    "Give an elaborate explanation of the image you see",
    "Share a comprehensive rundown of the presented image",
    "Offer a thorough analysis of the image",
    "Explain the various aspects of the image before you",
    "Clarify the contents of the displayed image with great detail",
    "Characterize the image using a well-detailed description",
    "Break down the elements of the image in a detailed manner",
    "Walk through the important details of the image",
    "Portray the image with a rich, descriptive narrative",
    "Narrate the contents of the image with precision",
    "Analyze the image in a comprehensive and detailed manner",
    "Illustrate the image through a descriptive explanation",
    "Examine the image closely and share its details",
    "Write an exhaustive depiction of the given image",
)
"""Ask for a detailed description (no full stop, as the paper prints them)."""


def draw_instruction(instructions: Sequence[str], seed: int, sample_id: str) -> str:
    """One of ``instructions``, as a pure function of (seed, sample id)."""
    digest = hashlib.sha256(f"{seed}|{sample_id}".encode()).digest()
    return instructions[int.from_bytes(digest[:8], "big") % len(instructions)]
