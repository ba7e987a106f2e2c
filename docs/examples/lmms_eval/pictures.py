"""What pictures.yaml calls: a question's picture, and whether the whole answer is right, ignoring case."""

from typing import Any

from PIL import Image


def open_picture(doc: dict[str, Any]) -> list[Image.Image]:
    """The one picture of a question."""
    return [Image.open(doc["image"]).convert("RGB")]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """As tools/evaluate scores."""
    return {"exact_match": float(results[0].strip().lower() == doc["answer"].strip().lower())}
