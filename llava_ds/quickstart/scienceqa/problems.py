"""Problems with ScienceQA's fields about the quickstart's concepts, in three subjects, with a picture, a text, or none.

Every kind of problem is a function of (random numbers, concepts, a way to draw one). Right choices are equally
frequent, so that guessing is right once in as many times as there are choices. The choices of a kind are always the
same in the same order: to look up which letter stands before a text is more than two layers learn in minutes (tried).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from llava_ds.quickstart.concepts import Concept
from llava_ds.quickstart.scenes import PLACES

LIVING = ("animal bird", "animal bug", "animal mammal", "food fruit", "plant flower")
GROUPS = ("animal", "drink", "food", "plant")
CATEGORIES = ("nature", "food")
NUMBERS = ("1", "2", "3", "4")

Draw = Callable[[Concept], Image.Image]


@dataclass(frozen=True)
class Problem:
    """One problem; ``topic``, ``category`` and ``skill`` are ScienceQA's, from coarse to fine."""

    subject: str
    topic: str
    category: str
    skill: str
    question: str
    choices: tuple[str, ...]
    answer: int
    solution: str
    lecture: str = ""
    hint: str = ""
    picture: Image.Image | None = None


Kind = Callable[[random.Random, Sequence[Concept], Draw], Problem]


def kind_of_picture(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A picture, no text: which of five kinds of living things it shows."""
    kind = rng.choice(LIVING)
    concept = rng.choice([concept for concept in concepts if concept.subcategory == kind])
    return Problem(
        "natural science", "biology", "Classification", "Identify kinds in pictures", "Which kind is this?",
        LIVING, LIVING.index(kind), f"This is {kind}.", "Look at the picture.", picture=draw(concept),
    )


def category_of_picture(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A picture and a text: nature or food."""
    concept = _of_category(rng, concepts)
    return Problem(
        "natural science", "biology", "Classification", "Sort pictures", "Nature or food?", CATEGORIES,
        CATEGORIES.index(concept.category), f"This is {concept.category}.", "Look at the picture.",
        "The picture shows one thing.", draw(concept),
    )


def group_of_a_thing(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """Neither picture nor text: what a thing is."""
    group = rng.choice(GROUPS)
    concept = rng.choice([concept for concept in concepts if concept.subcategory.split()[0] == group])
    return Problem(
        "natural science", "biology", "Classification", "Identify things", f"What is {concept.name}?", GROUPS,
        GROUPS.index(group), f"{concept.name}, {concept.subcategory}.",
    )


def things_on_a_map(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A picture, no text: how many things a map shows."""
    number = rng.randint(1, len(PLACES))
    pictures = [draw(concept) for concept in rng.sample(concepts, number)]
    return Problem(
        "social science", "geography", "Maps", "Read a map", "How many things are on the map?", NUMBERS, number - 1,
        f"It shows {number}.", "Look at the map.", picture=_map(pictures, rng.sample(PLACES, number)),
    )


def place_in_a_text(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A text, no picture: where a thing stands."""
    name, place = rng.choice(concepts).name, rng.choice(PLACES)
    return Problem(
        "social science", "geography", "Maps", "Find a place", f"Where is the {name}?", PLACES, PLACES.index(place),
        f"It is {place}.", hint=f"{place} {name}",
    )


def words_of_a_text(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A text, no picture: how many words its list has."""
    number = rng.randint(1, 3)
    return Problem(
        "language science", "reading-comprehension", "Lists", "Count words", "How many names are listed?", NUMBERS[:3],
        number - 1, f"It lists {number}.", hint=", ".join(concept.name for concept in rng.sample(concepts, number)),
    )


def category_of_a_word(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """Neither picture nor text: whether a word names nature or food."""
    concept = _of_category(rng, concepts)
    return Problem(
        "language science", "vocabulary", "Meanings", "Sort words", f"Is {concept.name} nature or food?",
        CATEGORIES, CATEGORIES.index(concept.category), f"{concept.name}, {concept.category}.",
    )


KINDS: tuple[Kind, ...] = (
    kind_of_picture, category_of_picture, group_of_a_thing, things_on_a_map, place_in_a_text, words_of_a_text,
    category_of_a_word,
)


def _of_category(rng: random.Random, concepts: Sequence[Concept]) -> Concept:
    """A concept; both categories are as likely."""
    category = rng.choice(CATEGORIES)
    return rng.choice([concept for concept in concepts if concept.category == category])


def _map(pictures: Sequence[Image.Image], places: Sequence[str]) -> Image.Image:
    """Pictures at half their size, each in its corner."""
    size = pictures[0].width
    canvas = Image.new("RGB", (size, size), "white")
    for picture, place in zip(pictures, places, strict=True):
        corner = (size // 2 if "right" in place else 0, size // 2 if "bottom" in place else 0)
        canvas.paste(picture.resize((size // 2, size // 2), Image.Resampling.LANCZOS), corner)
    return canvas
