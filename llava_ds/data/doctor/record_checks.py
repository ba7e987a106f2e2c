"""What is wrong or unusual about the text of one record: every fault of it, not only the first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.doctor.findings import CATALOGUE, ERROR
from llava_ds.data.doctor.salvage import ReadRecord
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.schema import EncodedSample, Sample, Turn
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import TOO_LONG, check_images, rounds_of
from llava_ds.text.templates import CHAT_TEMPLATE, AnyTemplate, get_template
from llava_ds.text.truncation import NOTHING_LEFT

Found = tuple[str, str]
"""A name of findings.py, and what there is to say."""

_SPECIALS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TEMPLATE_MARKS = ("[INST]", "[/INST]", "###", "USER:", "ASSISTANT:")
_BY_REASON = {"unknown role": "unknown_role", TOO_LONG: "too_long", NOTHING_LEFT: "no_supervised_token"}


@dataclass(frozen=True)
class RecordChecks:
    """Checks records by a template, and with ``text`` by what the tokenizer and the limit make of them."""

    text: TextPipeline | None
    template: str

    def check(self, record: ReadRecord) -> tuple[list[Found], EncodedSample | None]:
        """What was found, each name once, and the record as ids (image first) where it can be had."""
        found = [] if record.error is None else [_by_reason(record.error, "bad_record")]
        sample = record.sample
        if sample is not None and not sample.images:
            found.append(("text_only", "no image"))
        if sample is None or not record.has_turns:
            return found, None
        found += [*_image_places(sample), *self._texts(sample)]
        if record.error is None:
            found += _order(sample)
        if any(CATALOGUE[name][0] == ERROR for name, _ in found):
            return found, None
        try:
            return self._encode(sample, found)
        except DataError as error:
            return [*found, _by_reason(error, "refused_by_template")], None

    @cached_property
    def _template(self) -> AnyTemplate:
        if self.text is not None:
            return resolve_template(self.template, self.text.tokenizer)
        return get_template("v1" if self.template == CHAT_TEMPLATE else self.template)

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        own = self.text.tokenizer.all_special_tokens if self.text else ()
        specials = {*_SPECIALS, *map(str, own)} - {IMAGE_PLACEHOLDER, ""}
        return {"special_token_in_text": _any_of(specials), "template_in_text": _any_of(_TEMPLATE_MARKS)}

    def resolve(self) -> None:
        """Raises ConfigError when the template is unknown, or does not go with the tokenizer."""
        if self.text is not None:
            self.text.resolve()
        self._template  # noqa: B018
        self._patterns  # noqa: B018

    def _texts(self, sample: Sample) -> Iterator[Found]:
        turns = _without_leading_answer(sample)
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        questions = [turn.text for turn in turns if turn.role == "user"]
        if "" in answers:
            yield "empty_answer", f"{answers.count('')} of {len(answers)} answers are empty"
        if blank := sum(1 for answer in answers if answer and not answer.strip()):
            yield "blank_answer", f"{blank} of {len(answers)} answers are white space only"
        empty = sum(1 for question in questions if not question.replace(IMAGE_PLACEHOLDER, "").strip())
        if empty and not self._template.drops_question:
            yield "empty_question", f"{empty} of {len(questions)} questions have no text"
        for name, pattern in self._patterns.items():
            if strings := {match for turn in sample.turns for match in pattern.findall(turn.text)}:
                yield name, f"in its text: {', '.join(sorted(strings))}"

    def _encode(self, sample: Sample, found: list[Found]) -> tuple[list[Found], EncodedSample | None]:
        """Raises DataError where training would refuse it."""
        if self.text is None:
            rounds_of(sample, self._template)
            check_images(sample)
            return found, None
        orders = self.text.encode_orders(sample)
        longest = max(orders, key=lambda encoded: encoded.num_cut_tokens)
        if longest.num_cut_tokens:
            num_turns = longest.num_cut_turns
            what = f"the last {num_turns} of {len(sample.turns)} turns" if num_turns else "the end"
            found.append(("turns_cut", f"{what}, {longest.num_cut_tokens} tokens, do not fit"))
        found += _unknown_tokens(self.text.tokenizer, orders[0].input_ids)
        return found, orders[0]


def _by_reason(error: DataError, otherwise: str) -> Found:
    return _BY_REASON.get(error.reason, otherwise), str(error)


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))))


def _image_places(sample: Sample) -> Iterator[Found]:
    num_asked = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns if turn.role == "user")
    if num_asked != len(sample.images):
        yield "image_count_mismatch", f"{num_asked} '{IMAGE_PLACEHOLDER}' in questions, {len(sample.images)} images"
    if any(IMAGE_PLACEHOLDER in turn.text for turn in sample.turns if turn.role == "assistant"):
        yield "image_in_answer", f"'{IMAGE_PLACEHOLDER}' in an answer; it belongs into a question"


def _order(sample: Sample) -> Iterator[Found]:
    turns = _without_leading_answer(sample)
    if len(turns) < len(sample.turns):
        yield "leading_answer", "it begins with an answer"
    roles = [turn.role for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        yield "turns_do_not_alternate", f"the turns are by {', '.join(turn.role for turn in sample.turns) or 'nobody'}"


def _without_leading_answer(sample: Sample) -> tuple[Turn, ...]:
    return sample.turns[1:] if sample.turns and sample.turns[0].role == "assistant" else sample.turns


def _unknown_tokens(tokenizer: Any, ids: Sequence[int]) -> Iterator[Found]:
    unknown = tokenizer.unk_token_id
    # Some tokenizers call their end of text unknown, too.
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) or unknown not in ids:
        return
    collides = "; it is the padding token too, which changes nothing here" if unknown == tokenizer.pad_token_id else ""
    yield "unknown_token", f"{ids.count(unknown)} of {len(ids)} tokens are {tokenizer.unk_token}{collides}"
