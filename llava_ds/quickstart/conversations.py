"""The quickstart's texts, as ordinary LLaVA JSON: captions, conversations, and questions to score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llava_ds.quickstart.concepts import Concept
from llava_ds.quickstart.scenes import Scene
from llava_ds.text.instructions import BRIEF_INSTRUCTIONS

NAME_QUESTION = "What is this?"
SUBCATEGORY_QUESTION = "Which kind?"
CATEGORY_QUESTION = "Nature or food?"
COUNT_QUESTION = "How many things?"
NUM_DESCRIPTION_WORDS = 10


def caption_record(concept: Concept, record_id: str, image: str) -> dict[str, Any]:
    """Stage 1: the naive expansion, caption as the answer to a describe-the-image question."""
    question = BRIEF_INSTRUCTIONS[_rng(record_id).randrange(len(BRIEF_INSTRUCTIONS))]
    return _record(record_id, image, [(question, f"{concept.name}, {concept.subcategory}, {concept.category}")])


def picture_record(concept: Concept, record_id: str, image: str) -> dict[str, Any]:
    """Stage 2: name, kind and category of one picture, in random order."""
    rounds = concept_rounds(concept)
    _rng(record_id).shuffle(rounds)
    return _record(record_id, image, rounds)


def scene_record(scene: Scene, image: str) -> dict[str, Any]:
    """Stage 2: counting, naming and position questions about a scene."""
    rounds = scene_rounds(scene)
    _rng(scene.id).shuffle(rounds)
    return _record(scene.id, image, rounds)


def concept_rounds(concept: Concept) -> list[tuple[str, str]]:
    """Questions and answers about one picture."""
    return [
        (NAME_QUESTION, concept.name),
        (SUBCATEGORY_QUESTION, concept.subcategory),
        (CATEGORY_QUESTION, concept.category),
    ]


def scene_rounds(scene: Scene) -> list[tuple[str, str]]:
    """Questions and answers about a scene: how many, what is where, where is what."""
    thing = _rng(scene.id).choice(scene.things)
    other = _rng(f"{scene.id}|other").choice(scene.things)
    return [
        (COUNT_QUESTION, str(len(scene.things))),
        (f"What is {thing.place}?", thing.concept.name),
        (f"Where is the {other.concept.name}?", other.place),
    ]


def eval_records(concept: Concept, record_id: str, image: str) -> list[dict[str, Any]]:
    """The scored questions about one picture of the unseen style."""
    kinds = ("name", "subcategory", "category")
    return [
        {"id": f"{record_id}-{kind}", "image": image, "kind": kind, "question": question, "answer": answer}
        for kind, (question, answer) in zip(kinds, concept_rounds(concept), strict=True)
    ]


def scene_eval_records(scene: Scene, image: str) -> list[dict[str, Any]]:
    """The scored questions about one scene of the unseen style."""
    kinds = ("scene count", "scene name", "scene position")
    return [
        {"id": f"{scene.id}-{kind}", "image": image, "kind": kind, "question": question, "answer": answer}
        for kind, (question, answer) in zip(kinds, scene_rounds(scene), strict=True)
    ]


def concept_words(concept: Concept, record_id: str) -> str:
    """What a picture shows, as words in random order, some of them repeated.

    Patches of a picture carry no word order either: an LLM that learned to answer from such words has learned what
    stage 1 needs of it, to look the answer up in what stands where the image will stand.
    """
    rng = _rng(f"{record_id}|words")
    words = f"{concept.name} {concept.subcategory} {concept.category}".split()
    words += rng.choices(words, k=max(0, NUM_DESCRIPTION_WORDS - len(words)))
    rng.shuffle(words)
    return " ".join(words)


def scene_words(scene: Scene) -> str:
    """What a scene shows and where, in random order."""
    phrases = [f"{thing.place} {thing.concept.name}" for thing in scene.things]
    _rng(f"{scene.id}|words").shuffle(phrases)
    return ", ".join(phrases)


def text_record(record: dict[str, Any], words: str) -> dict[str, Any]:
    """The same conversation with words in the place of its image: what the small LLM learns from."""
    turns = [{**turn, "value": turn["value"].replace("<image>", words)} for turn in record["conversations"]]
    return {"id": f"text-{record['id']}", "conversations": turns}


def _record(record_id: str, image: str, rounds: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": record_id, "image": image, "conversations": turns}


def _rng(key: str) -> random.Random:
    return random.Random(key)
