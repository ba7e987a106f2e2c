"""An image in words and numbers, as a language model is shown it (paper, section 3)."""

from __future__ import annotations

from llava_ds.datagen.kinds import Kind
from llava_ds.datagen.records import AnnotatedImage, Instance


def describe_image(image: AnnotatedImage, kind: Kind) -> str:
    """Its captions, one a line; where the kind sees boxes and there are some, a blank line and a line for each box."""
    parts = ["\n".join(image.captions)]
    if kind.sees_boxes and image.instances:
        parts.append("\n".join(map(describe_instance, image.instances)))
    return "\n\n".join(parts)


def describe_instance(instance: Instance) -> str:
    """``category: [x1, y1, x2, y2]``, three decimals."""
    return f"{instance.category}: [{', '.join(f'{edge:.3f}' for edge in instance.box)}]"
