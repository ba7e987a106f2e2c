"""What tools/doctor can find: stable names, how bad each is, and counts with a few examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)

CATALOGUE: dict[str, tuple[str, str]] = {
    "bad_record": (ERROR, "the record cannot be read"),
    "unknown_role": (ERROR, "a role that is neither human nor gpt"),
    "turns_do_not_alternate": (ERROR, "turns do not alternate human, gpt, ... and end with gpt"),
    "image_count_mismatch": (ERROR, "'<image>' placeholders do not match the images"),
    "image_in_answer": (ERROR, "'<image>' in an answer"),
    "empty_answer": (ERROR, "an empty answer"),
    "refused_by_template": (ERROR, "the template does not take the record"),
    "too_long": (ERROR, "the whole sample is lost: it does not fit"),
    "no_supervised_token": (ERROR, "no supervised token is left within the limit"),
    "image_missing": (ERROR, "an image file is missing"),
    "image_does_not_decode": (ERROR, "an image cannot be read or decoded"),
    "image_unfit": (ERROR, "an image too far from a square, or too large, to be scaled"),
    "empty_question": (WARNING, "a question without text"),
    "blank_answer": (WARNING, "an answer of white space only"),
    "leading_answer": (WARNING, "the record begins with an answer, which is left out"),
    "turns_cut": (WARNING, "turns at the end are lost to the limit"),
    "special_token_in_text": (WARNING, "a special token stands in the text, where it stays text"),
    "template_in_text": (WARNING, "marks of a prompt template stand in the text"),
    "duplicate_id": (WARNING, "the id of an earlier record"),
    "duplicate_record": (WARNING, "the images and turns of an earlier record"),
    "image_animated": (WARNING, "an animated or many-page picture, of which the first frame is used"),
    "image_16_bit": (WARNING, "a picture of more than 8 bits a channel"),
    "image_cmyk": (WARNING, "a CMYK picture, converted without its colour profile"),
    "image_huge": (WARNING, "a huge picture, slow to decode"),
    "image_tiny": (WARNING, "a picture of next to no pixels"),
    "image_elongated": (WARNING, "a picture far from a square"),
    "image_rotated": (WARNING, "an EXIF orientation, which is not applied"),
    "image_partly_damaged": (WARNING, "a picture that decodes, in a file that is damaged elsewhere, as in EXIF"),
    "image_shared": (NOTE, "an image that another record has too"),
    "text_only": (NOTE, "no image"),
    "unknown_token": (NOTE, "the tokenizer has only its unknown token for some of the text"),
}
"""By name: severity, and what it means. Errors are records that training refuses or skips."""

NUM_EXAMPLES = 5
_MESSAGE_LENGTH = 300


class Example(NamedTuple):
    """Where something was found. ``id`` is None where the record has none that can be read."""

    origin: str
    id: str | None
    message: str


@dataclass
class Findings:
    """How many records have what, and the first examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, name: str, origin: str, sample_id: str | None, message: str) -> None:
        """Counts one more record."""
        self.counts[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < NUM_EXAMPLES:
            message = message if len(message) <= _MESSAGE_LENGTH else message[:_MESSAGE_LENGTH] + "..."
            sample_id = None if sample_id is None else _printable(sample_id)
            examples.append(Example(_printable(origin), sample_id, _printable(message)))

    def merge(self, later: Findings) -> None:
        """Adds those of later records."""
        self.counts.update(later.counts)
        for name, examples in later.examples.items():
            self.examples[name] = (self.examples.get(name, []) + examples)[:NUM_EXAMPLES]


def _printable(text: str) -> str:
    """Half a surrogate pair, as names of files can hold, cannot be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
