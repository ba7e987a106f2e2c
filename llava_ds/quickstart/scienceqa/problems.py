"""Problems with ScienceQA's fields about the quickstart's concepts, in three subjects, with a picture, a text, or none.

Every kind of problem is a function of (random numbers, concepts, a way to draw one). Solutions name the right choice,
so that a small LLM has a reason to look for it among the options.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from llava_ds.quickstart.concepts import Concept
from llava_ds.quickstart.scenes import PLACES

MOST_CHOICES = 5

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
    """A picture, no text: which kind of thing it shows."""
    concept = rng.choice(concepts)
    choices, answer = _choices(rng, concept.subcategory, sorted({other.subcategory for other in concepts}))
    return Problem(
        "natural science", "biology", "Classification", "Identify the kind in a picture", "Which kind is this?",
        choices, answer, f"This is {concept.subcategory}.", "Look at the picture.", picture=draw(concept),
    )


def category_of_picture(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A picture and a text: nature or food."""
    concept = rng.choice(concepts)
    choices, answer = _choices(rng, concept.category, ("nature", "food"))
    return Problem(
        "natural science", "biology", "Classification", "Sort pictures", "Nature or food?", choices, answer,
        f"This is {concept.category}.", "Look at the picture.", "The picture shows one thing.", draw(concept),
    )


def thing_of_a_kind(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """Neither picture nor text: which of some things is of a kind."""
    concept = rng.choice(concepts)
    others = [other.name for other in concepts if other.subcategory != concept.subcategory]
    choices, answer = _choices(rng, concept.name, others)
    return Problem(
        "natural science", "biology", "Classification", "Identify things of a kind",
        f"What is {concept.subcategory}?", choices, answer, f"{concept.name}, {concept.subcategory}.",
    )


def place_on_a_map(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A picture, no text: in which corner of a map its one thing stands."""
    place = rng.choice(PLACES)
    choices, answer = _choices(rng, place, PLACES)
    return Problem(
        "social science", "geography", "Maps", "Read a map", "Where is it on the map?", choices, answer,
        f"It is {place}.", "Look at the map.", picture=_on_map(draw(rng.choice(concepts)), place),
    )


def place_in_a_text(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A text, no picture: where one of two things stands."""
    things, places = rng.sample(concepts, 2), rng.sample(PLACES, 2)
    choices, answer = _choices(rng, places[0], PLACES)
    phrases = [f"{place} {thing.name}" for place, thing in zip(places, things, strict=True)]
    rng.shuffle(phrases)
    return Problem(
        "social science", "geography", "Maps", "Find a place in a text", f"Where is the {things[0].name}?", choices,
        answer, f"It is {places[0]}.", hint=", ".join(phrases),
    )


def word_of_a_text(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """A text, no picture: which word stands in it."""
    in_text, *others = (concept.name for concept in rng.sample(concepts, MOST_CHOICES + 2))
    choices, answer = _choices(rng, in_text, others)
    unused = next(name for name in others if name not in choices)
    hint = ", ".join(rng.sample([in_text, unused], 2))
    return Problem(
        "language science", "reading-comprehension", "Details", "Find a word", "Which word is in the text?", choices,
        answer, f"It is {in_text}.", hint=hint,
    )


def word_of_a_category(rng: random.Random, concepts: Sequence[Concept], draw: Draw) -> Problem:
    """Neither picture nor text: which word names food, or nature."""
    concept = rng.choice(concepts)
    choices, answer = _choices(rng, concept.name, [c.name for c in concepts if c.category != concept.category])
    return Problem(
        "language science", "vocabulary", "Meanings", "Sort words", f"Which word is {concept.category}?", choices,
        answer, f"{concept.name}, {concept.category}.",
    )


KINDS: tuple[Kind, ...] = (
    kind_of_picture, category_of_picture, thing_of_a_kind, place_on_a_map, place_in_a_text, word_of_a_text,
    word_of_a_category,
)


def _choices(rng: random.Random, right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Two to five choices in random order, ``right`` and some of the others, and where ``right`` stands."""
    others = [text for text in dict.fromkeys(wrong) if text != right]
    choices = [right, *rng.sample(others, min(rng.randint(1, MOST_CHOICES - 1), len(others)))]
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def _on_map(picture: Image.Image, place: str) -> Image.Image:
    size = picture.width
    canvas = Image.new("RGB", picture.size, "white")
    corner = (size // 2 if "right" in place else 0, size // 2 if "bottom" in place else 0)
    canvas.paste(picture.resize((size // 2, size // 2), Image.Resampling.LANCZOS), corner)
    return canvas
