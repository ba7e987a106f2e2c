"""PYTEST_DONT_REWRITE: comparing ids of long texts, its explanations take minutes.

Mutated records become correct samples or located errors: what is right is worked out here a second time.

The oracle shares nothing with llava_ds.text: layouts are written as strings with marks, ids come from SentencePiece
itself (or from a BPE without special tokens), and every token is spelled in bytes. So what is compared is exact: the
bytes of the ids are those of the conversation, and a label is set just where a token has a byte of an answer or stop.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.data.preview import sample_record
from llava_ds.data.sources.formats import open_source
from llava_ds.data.sources.llava_json import parse_record
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.models.build import load_tokenizer
from llava_ds.schema import EncodedSample, Sample
from tests.helpers.mutations import DAMAGES, KINDS, mutate, write_line
from tests.unit.test_chat_template import CHATML, LLAMA_3, MISTRAL, PHI
from tests.unit.test_encode_golden import GOLDEN, _write_vicuna

IMAGE = "<image>"
BATCH = 250
PARSE_REASONS = {
    "not an object", "no 'id'", "'id' is no text", "'image' is no path or list", "'conversations' is no list",
    "'conversations' is empty", "a turn without from or value", "unknown role", "not Unicode text", "not UTF-8 text",
    "not valid JSON",
}
TOO_LONG, NOTHING_LEFT = "longer than data.max_length", "no supervised token is left"
REFUSED_BY_CHAT = "the tokenizer's chat template refuses it"
ENCODE_REASONS = {
    "turns do not alternate human, gpt", "an empty answer", "more than one round, template 'plain' takes one",
    "no image, template 'plain' needs one", "'<image>' in an assistant's turn",
    "'<image>' placeholders do not match the images", TOO_LONG, NOTHING_LEFT, REFUSED_BY_CHAT,
    "'<image>' within '<image>'",
}

# How a conversation reads: header, one round, between two rounds, after the last. «q» is a question, «a» an answer,
# other «names» are special tokens; supervised is what stands in ⟦ ⟧.
CURIOUS = "A chat between a curious {} and an artificial intelligence assistant. The assistant gives helpful, " \
          "detailed, and polite answers to the {}'s questions."
LLAMA_2 = "<<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content " \
          "that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
VICUNA_ROUND, INST_ROUND = "USER: «q» ASSISTANT:⟦ «a»«eos»⟧", "«q» [/INST]⟦ «a» «eos»⟧"
CHATML_ROUND = "«im_start»user\n«q»«im_end»«im_start»assistant\n⟦«a»«im_end»⟧"
FROZEN = {
    "plain": ("«start»", "«images»⟦«a»\n⟧", "", ""),
    "short": ("«start»", "Q: «q»\nA:⟦ «a»«eos»⟧", "", ""),
    "v0": ("«start»" + CURIOUS.format("human", "human") + "\n\n###", " Human: «q»\n### Assistant:⟦ «a»\n###⟧", "", " "),
    "v1": ("«start»" + CURIOUS.format("user", "user") + " ", VICUNA_ROUND, "", ""),
    "llava_v1": ("«start»" + CURIOUS.format("human", "human") + " ", VICUNA_ROUND, "", ""),
    "llava_llama_2": ("«start»[INST] " + LLAMA_2, INST_ROUND, "«bos»[INST] ", ""),
    "mistral": ("«start»[INST] ", INST_ROUND, "[INST] ", ""),
    "mpt": (f"«start»«im_start»system\n{MPT}«im_end»", CHATML_ROUND, "", ""),
    "chatml": ("«start»«im_start»system\nAnswer the questions.«im_end»", CHATML_ROUND, "", ""),
}
ALIASES = {"v0_plain": "plain", "vicuna_v0": "v0", "vicuna_v1": "v1", "llama_2": "llava_llama_2", "mpt_text": "mpt",
           "mistral_instruct": "mistral", "chatml_direct": "chatml"}
OWN = {
    "chatml": (CHATML, ("", "«im_start»user\n«q»«im_end»\n«im_start»assistant\n⟦«a»«im_end»⟧\n", "", "")),
    "llama3": (LLAMA_3, ("«bos»", "«head»user«body»\n\n«q»«eot»«head»assistant«body»\n\n⟦«a»«eot»⟧", "", "")),
    "mistral": (MISTRAL, ("«bos»", "«INST» «q» «/INST»⟦ «a»«eos»⟧", "", "")),
    # The white space behind Phi's tokens is theirs.
    "phi": (PHI, ("", "«user»«q»«end»«assistant»⟦«a»«end»⟧", "", "")),
}
PICKY = "{% if messages | length > 6 %}{{ raise_exception('no') }}{% endif %}"
OWN["picky"] = (OWN["mistral"][0] + PICKY, OWN["mistral"][1])
WRITTEN = {"im_start": "<|im_start|>", "im_end": "<|im_end|>", "INST": "[INST]", "/INST": "[/INST]", "head": "<|head|>",
           "body": "<|body|>", "eot": "<|eot|>", "user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}
POLICIES = ("drop_last_turns", "drop_last_turns", "drop_sample", "error", "official", "none")

Spelled = list[tuple[int, bytes]]


@dataclass(frozen=True)
class Speech:
    """A tokenizer, and what is known of it without asking llava_ds."""

    tokenizer: Any
    own: str | None
    spell: Callable[[str, bool], Spelled]
    """Ids of a text, each with its bytes; with SentencePiece's leading space or without."""
    is_sentencepiece: bool
    begins_with_bos: bool
    vocab: dict[str, int]

    def special(self, name: str) -> int | None:
        if name == "start":
            return self.tokenizer.bos_token_id if self.begins_with_bos else None
        if name in ("bos", "eos"):
            return {"bos": self.tokenizer.bos_token_id, "eos": self.tokenizer.eos_token_id}[name]
        return self.vocab.get(WRITTEN[name])


@dataclass(frozen=True)
class Case:
    """Everything that is drawn for one record."""

    seed: int
    speech: str
    template: str
    pipeline: TextPipeline
    epochs: tuple[int, int]


@dataclass(frozen=True)
class Expected:
    ids: list[int]
    labels: list[int]
    images: int
    cut_turns: int = 0
    supervised_texts: tuple[str, ...] = ()


class Refused(Exception):
    """The oracle's refusal: any of these reasons is right."""

    def __init__(self, *reasons: str) -> None:
        super().__init__(*reasons)
        self.reasons = set(reasons)


def _spell_sentencepiece(model: SentencePieceProcessor) -> Callable[[str, bool], Spelled]:
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    spelled = [
        bytes([int(piece[3:5], 16)]) if model.is_byte(number) else piece.replace("▁", " ").encode()
        for number, piece in enumerate(pieces)
    ]

    def spell(text: str, lead: bool) -> Spelled:
        ids = model.encode(text) if lead else model.encode("\n" + text)[2:]
        return [(number, spelled[number]) for number in ids]

    return spell


def _spell_bytelevel(core: Tokenizer) -> Callable[[str, bool], Spelled]:
    raw = json.loads(core.to_str()) | {"added_tokens": [], "post_processor": None}
    plain = Tokenizer.from_str(json.dumps(raw))
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes the other bytes from 256 on
    values = {chr(code): code for code in own}
    values |= {chr(256 + n): code for n, code in enumerate(code for code in range(256) if code not in own)}

    def spell(text: str, lead: bool) -> Spelled:
        found = plain.encode(text, add_special_tokens=False)
        pairs = zip(found.ids, found.tokens, strict=True)
        return [(i, bytes(values[letter] for letter in token)) for i, token in pairs]

    return spell


@pytest.fixture(scope="module")
def speeches(tmp_path_factory) -> dict[str, Speech]:
    folder = _write_vicuna(tmp_path_factory.mktemp("fuzz") / "vicuna")
    spell = _spell_sentencepiece(SentencePieceProcessor(str(folder / "tokenizer.model")))
    found = {}
    for name, own in (("vicuna", None), ("vicuna-mistral", "mistral")):
        tokenizer = load_tokenizer(str(folder))
        tokenizer.chat_template = own and OWN[own][0]
        found[name] = Speech(tokenizer, own, spell, True, True, tokenizer.get_vocab())
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", *[WRITTEN[name] for name in ("im_start", "im_end", "head", "body", "eot", "INST", "/INST")]]
    texts = [turn["value"] for record in _golden() for turn in record["conversations"]]
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=names
    ))
    spell = _spell_bytelevel(core)
    for name in ("none", "trimmed", "bos", *OWN):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(core.to_str()), bos_token="<s>", eos_token="</s>"
        )
        own = name if name in OWN else None
        tokenizer.chat_template = own and OWN[own][0]
        if name == "trimmed":  # as GPT-NeoX, whose offsets leave out spaces
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        if name == "bos":
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
        if name == "phi":
            swallowing = [AddedToken(WRITTEN[n], special=True, rstrip=True) for n in ("end", "user", "assistant")]
            tokenizer.add_tokens(swallowing, special_tokens=True)
        found[f"bytes-{name}"] = Speech(tokenizer, own, spell, False, name == "bos", tokenizer.get_vocab())
    return found


@cache
def _golden() -> list[dict]:
    return json.loads((GOLDEN / "conversations.json").read_text())


# The oracle: a record.

def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise Refused("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise Refused("not valid JSON") from None


def _known_id(value: Any) -> str | None:
    found = value.get("id") if isinstance(value, dict) else None
    return str(found) if type(found) in (str, int) else None


def _record_faults(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return {"not an object"}
    faults = set()
    if _known_id(value) is None:
        faults.add("'id' is no text" if "id" in value else "no 'id'")
    image, turns = value.get("image"), value.get("conversations")
    names = image if isinstance(image, list) else [] if image is None or image == "" else [image]
    if any(not isinstance(name, str) or name == "" for name in names):
        faults.add("'image' is no path or list")
    if not isinstance(turns, list) or not turns:
        faults.add("'conversations' is empty" if turns == [] else "'conversations' is no list")
        turns = []
    texts = [_known_id(value) or "", *(name for name in names if isinstance(name, str))]
    for turn in turns:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            faults.add("a turn without from or value")
            continue
        if role not in ("human", "gpt", "user", "assistant"):
            faults.add("unknown role")
        texts.append(text)
    if any(0xD800 <= ord(letter) <= 0xDFFF for text in texts for letter in text):
        faults.add("not Unicode text")
    return faults


def _dialogue(value: dict) -> list[tuple[str, str]]:
    """(q or a, text) of a record without faults."""
    return [("q" if turn["from"] in ("human", "user") else "a", turn["value"]) for turn in value["conversations"]]


def _paths(value: dict, root: Path) -> tuple[str, ...]:
    image = value.get("image")
    return tuple(str(root / name) for name in (image if isinstance(image, list) else [image] if image else []))


# The oracle: a conversation. A question is the list of texts around its images.

Dialogue = list[tuple[str, list[str]]]


def _place(dialogue: list[tuple[str, str]], image_first: bool | None, every_question: bool) -> Dialogue:
    placed = [(who, text.split(IMAGE) if who == "q" else [text]) for who, text in dialogue]
    questions = [n for n, (who, _) in enumerate(placed) if who == "q"]
    for number in questions if every_question else questions[:1]:
        chunks = placed[number][1]
        if image_first is None or len(chunks) == 1:
            continue
        question = "".join(chunks).strip()
        seams = ["\n"] * (len(chunks) - 2)
        if image_first:
            placed[number] = ("q", ["", *seams, "\n" + question if question else ""])
        else:
            placed[number] = ("q", [question + "\n" if question else "", *seams, ""])
    return placed


def _expect(speech: Speech, template: str, case: Case, dialogue: Dialogue, num_images: int) -> Expected:
    """Raises Refused."""
    pipeline = case.pipeline
    is_own = template == "chat_template"
    layout = OWN[speech.own or ""][1] if is_own else FROZEN[template]
    official_v0 = template == "v0" and pipeline.truncation == "official"
    in_questions = sum(len(chunks) - 1 for who, chunks in dialogue if who == "q")
    faults = set()
    if num_images != in_questions:
        faults.add("'<image>' placeholders do not match the images")
    if any(who == "a" and IMAGE in chunks[0] for who, chunks in dialogue):
        faults.add("'<image>' in an assistant's turn")
    rounds = dialogue[1:] if dialogue[0][0] == "a" else dialogue
    if not official_v0:
        faults |= set(_round_faults(rounds, template, speech, is_own))
    if faults:
        raise Refused(*faults)
    if official_v0:
        ids, labels = _official_v0(speech, dialogue, pipeline.num_patches)
        found = Expected(ids, labels, num_images)
    else:
        found = _within(speech, layout, rounds, pipeline, num_images, strips=is_own and speech.own == "llama3")
    if pipeline.truncation == "official" and not num_images:
        limit = pipeline.max_length
        found = Expected(found.ids[:limit], found.labels[:limit], 0)
    if all(label == -100 for label in found.labels):
        raise Refused(NOTHING_LEFT)
    return found


def _round_faults(rounds: Dialogue, template: str, speech: Speech, is_own: bool) -> Iterator[str]:
    if not rounds or [who for who, _ in rounds] != ["q", "a"] * (len(rounds) // 2):
        yield "turns do not alternate human, gpt"
    if any(who == "a" and chunks == [""] for who, chunks in rounds):
        yield "an empty answer"
    if template == "plain" and len(rounds) != 2:
        yield "more than one round, template 'plain' takes one"
    if template == "plain" and rounds and len(rounds[0][1]) == 1:
        yield "no image, template 'plain' needs one"
    if is_own and speech.own == "picky" and len(rounds) > 6:
        yield REFUSED_BY_CHAT


def _within(
    speech: Speech, layout: Sequence[str], turns: Dialogue, pipeline: TextPipeline, num_images: int, strips: bool
) -> Expected:
    rounds = [(turns[n][1], turns[n + 1][1][0]) for n in range(0, len(turns), 2)]
    is_own = pipeline.template == "chat_template"

    def build(kept: int) -> tuple[list[int], list[int]]:
        return _ids(speech, _parts(layout, rounds[:kept], strips), pipeline.num_patches, is_own)

    kept = len(rounds)
    ids, labels = build(kept)
    if pipeline.truncation in ("error", "drop_sample") and len(ids) > pipeline.max_length:
        raise Refused(TOO_LONG)
    if pipeline.truncation == "drop_last_turns" and len(ids) > pipeline.max_length:
        kept = 0
        while kept < len(rounds) and len(build(kept + 1)[0]) <= pipeline.max_length:
            kept += 1
        if not kept:
            raise Refused(TOO_LONG)
        ids, labels = build(kept)
        num_images = sum(len(question) - 1 for question, _ in rounds[:kept])
    frame = layout[1].partition("⟦")[2].partition("⟧")[0]
    texts = tuple(frame.replace("«a»", answer.strip() if strips else answer) for _, answer in rounds[:kept])
    return Expected(ids, labels, num_images, len(turns) - 2 * kept, texts)


# What a byte belongs to.
SYSTEM, GLUE, USER, LEARNT = b"s", b"g", b"u", b"l"
Part = tuple[str, str, bytes]  # kind (text, special, image), content, owner


def _parts(layout: Sequence[str], rounds: Sequence[tuple[list[str], str]], strips: bool) -> Iterator[Part]:
    header, frame, between, tail = layout
    yield from _lex(header, SYSTEM, [], "")
    for number, (question, answer) in enumerate(rounds):
        if strips:
            question = [*question[:-1], question[-1].rstrip()]
            question[0] = question[0].lstrip()
            answer = answer.strip()
        yield from _lex(between if number else "", GLUE, [], "")
        yield from _lex(frame, GLUE, question, answer)
    yield from _lex(tail, GLUE, [], "")


def _lex(pattern: str, owner: bytes, question: list[str], answer: str) -> Iterator[Part]:
    for part in re.split("(«[^»]*»|[⟦⟧])", pattern):
        if part in ("⟦", "⟧"):
            owner = LEARNT if part == "⟦" else GLUE
        elif part == "«q»":
            yield from _chunks(question, USER)
        elif part == "«images»":
            yield from (("image", "", USER) for _ in question[1:])
        elif part.startswith("«") and part != "«a»":
            yield "special", part[1:-1], owner
        else:
            yield "text", answer if part == "«a»" else part, owner


def _chunks(chunks: list[str], owner: bytes) -> Iterator[Part]:
    for number, chunk in enumerate(chunks):
        if number:
            yield "image", "", owner
        yield "text", chunk, owner


def _ids(speech: Speech, parts: Iterator[Part], num_patches: int, is_own: bool) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    run: list[tuple[str, bytes]] = []
    lead = True

    def flush() -> None:
        for token, owners in _owned(speech, run, lead and speech.is_sentencepiece):
            assert not (LEARNT in owners and (USER in owners or SYSTEM in owners)), "the oracle supervises a question"
            ids.append(token)
            labels.append(token if LEARNT in owners else -100)
        run.clear()

    for kind, content, owner in parts:
        token = speech.special(content) if kind == "special" else None
        if kind == "special" and token is None:
            if content == "start":
                continue
            kind, content = "text", WRITTEN[content]
        if kind == "text":
            if content:
                run.append((content, owner))
            continue
        flush()
        ids += [-200] * num_patches if token is None else [token]
        labels += [-100] * num_patches if token is None else [token if owner == LEARNT else -100]
        lead = content == "start" or (kind == "image" and not is_own)
    flush()
    return ids, labels


def _owned(speech: Speech, run: list[tuple[str, bytes]], lead: bool) -> Iterator[tuple[int, bytes]]:
    """The ids of a run of texts, and whose the bytes of each are."""
    if not run:
        return
    shown = [(" " * (lead and not n) + text, owner) for n, (text, owner) in enumerate(run)]
    if speech.is_sentencepiece:  # it takes the mark for a space
        shown = [(text.replace("▁", " "), owner) for text, owner in shown]
    owners = b"".join(owner * len(text.encode()) for text, owner in shown)
    spelled = speech.spell("".join(text for text, _ in run), lead)
    assert b"".join(piece for _, piece in spelled) == "".join(text for text, _ in shown).encode(), "ids lose text"
    position = 0
    for token, piece in spelled:
        yield token, owners[position : position + len(piece)]
        position += len(piece)


def _official_v0(speech: Speech, dialogue: Dialogue, num_patches: int) -> tuple[list[int], list[int]]:
    """The released masks: a turn is counted with a bos and an image as one, and loses its first two tokens never."""
    names = {"q": "Human", "a": "Assistant"}
    header = CURIOUS.format("human", "human") + "\n\n"

    def tokens(*parts: Part) -> list[int]:
        return _ids(speech, iter((("special", "start", GLUE), *parts)), 1, False)[0]

    turns = [[("text", f"### {names[who]}: ", GLUE), *_chunks(chunks, USER), ("text", "\n", GLUE)]
             for who, chunks in dialogue]
    head = ("text", header, SYSTEM)
    ids = tokens(head, *(part for turn in turns for part in turn), ("text", "### ", GLUE))
    begin = len(tokens(head))
    masked = set(range(begin))
    for (who, _), turn in zip(dialogue, turns, strict=True):
        end = begin + len(tokens(*turn))
        masked |= set(range(begin + 2, end)) if who == "q" else set()
        begin = end
    labels = [-100 if n in masked or i == -200 else i for n, i in enumerate(ids)]
    widths = [num_patches if i == -200 else 1 for i in ids]

    def widened(row):
        return [value for value, width in zip(row, widths, strict=True) for _ in range(width)]

    return widened(ids), widened(labels)


# The comparison.

def _check_error(error: Exception, origin: str, sample_id: str | None, reasons: set[str]) -> None:
    assert type(error) is DataError, f"{type(error).__name__} escaped: {error!s:.300}"
    message = str(error)
    assert re.match(re.escape(origin) + r"(?!\d)", message), f"not located at {origin}: {message!r:.200}"
    assert sample_id is None or f" id={sample_id!r}" in message, f"id {sample_id!r:.80} not in {message!r:.200}"
    assert error.reason in reasons, f"reason {error.reason!r}, wanted {sorted(reasons)}: {message!r:.200}"
    message.encode()  # can be written to a log


def _outcome(call: Callable[..., Any], *values: Any) -> Any:
    try:
        return call(*values)
    except Exception as error:  # noqa: BLE001 any other type is a finding
        return error


def _check_encoded(found: EncodedSample, expected: Expected, sample: Sample, case: Case, speech: Speech) -> None:
    ids, labels = list(found.input_ids), list(found.labels)
    assert len(ids) == len(labels)
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True)), "a label is not its id"
    assert all(label == -100 for i, label in zip(ids, labels, strict=True) if i == -200), "an image is supervised"
    assert ids.count(-200) == len(found.images) * case.pipeline.num_patches, "images and their positions"
    assert min(i for i in ids if i != -200) >= 0 and max(ids) < len(speech.vocab)
    assert found.id == sample.id
    assert found.num_supervised == sum(label != -100 for label in labels) > 0
    if case.pipeline.truncation not in ("official", "none"):
        assert len(ids) <= case.pipeline.max_length, "longer than promised"
    assert ids == expected.ids, f"ids: {_difference(ids, expected.ids, speech)}"
    assert labels == expected.labels, f"labels: {_difference(labels, expected.labels, speech)}"
    assert found.images == sample.images[: expected.images], "other images"
    assert found.num_cut_turns == expected.cut_turns, "cut turns"
    if expected.supervised_texts and case.pipeline.truncation != "official":
        _check_supervised_texts(labels, expected.supervised_texts, speech)


def _check_supervised_texts(labels: list[int], texts: tuple[str, ...], speech: Speech) -> None:
    """Through the tokenizer's own decoder, blind to white space at the ends and to SentencePiece's mark."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label != -100:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    decoded = [speech.tokenizer.decode(stretch) for stretch in stretches if stretch]
    wanted = [re.sub("«([^»]*)»", lambda mark: _written(mark[1], speech), text) for text in texts]
    assert len(decoded) == len(wanted), f"{len(decoded)} supervised stretches, {len(wanted)} answers"
    for got, want in zip(decoded, wanted, strict=True):
        want = want.replace("▁", " ") if speech.is_sentencepiece else want
        got, want = (re.sub(" +", " ", text).strip() for text in (got, want))
        # A stop that is no token of this tokenizer may share its last piece with what comes after it: "><".
        assert got.startswith(want) and len(got) - len(want) < 3, f"{got!r:.200} is not {want!r:.200}"


def _written(name: str, speech: Speech) -> str:
    return WRITTEN.get(name) or {"eos": speech.tokenizer.eos_token, "bos": speech.tokenizer.bos_token}[name]


def _difference(found: list[int], expected: list[int], speech: Speech) -> str:
    place = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
    around = slice(max(place - 3, 0), place + 5)
    return f"lengths {len(found)} {len(expected)}, at {place}: {found[around]} wanted {expected[around]}"


def _draw_case(seed: int, speeches: dict[str, Speech]) -> tuple[Case, bytes, list[str]]:
    """Settings, line and mutations: a pure function of the seed."""
    rng = Random(seed)
    record, kinds = mutate(rng, rng.choice(_golden()))
    line, damages = write_line(rng, record)
    name = rng.choice([*speeches, "vicuna", "vicuna", "vicuna", "vicuna"])
    if speeches[name].own:
        template = "chat_template"
    else:
        template = rng.choice([*FROZEN, *FROZEN, *ALIASES])
    pipeline = TextPipeline(
        tokenizer=speeches[name].tokenizer, template=template, placement=rng.choice(["as_data", "front", "random"]),
        num_patches=rng.choice([1, 3, 9]), max_length=rng.choice([16, 48, 96, 512, 2048]),
        seed=rng.choice([0, 1, 2**63]),
        truncation=rng.choice(POLICIES),
    )
    case = Case(seed, name, ALIASES.get(template, template), pipeline, (rng.randrange(3), rng.randrange(1000)))
    return case, line, kinds + damages


def _expect_order(case: Case, value: Any, speech: Speech, image_first: bool | None) -> Expected | Refused:
    dialogue = _place(_dialogue(value), image_first, case.pipeline.placement == "front")
    try:
        return _expect(speech, case.template, case, dialogue, len(_paths(value, Path())))
    except Refused as refused:
        return refused


def _check_text(case: Case, value: Any, sample: Sample, speech: Speech, seen: Counter) -> EncodedSample | None:
    """Every way to encode a good record; returns what its first epoch gives."""
    text = case.pipeline
    orders = {"as_data": (None,), "front": (True,), "random": (True, False)}[text.placement]
    expected = [_expect_order(case, value, speech, order) for order in orders]
    questions = [text for who, text in _dialogue(value) if who == "q"]
    # Where a placeholder is left when others are taken out, a text cannot say which is meant: an error is right, too.
    may_refuse = text.placement != "as_data" and any(IMAGE in text.replace(IMAGE, "") for text in questions)

    def matches(found: Any, wanted: Expected | Refused) -> None:
        if may_refuse and isinstance(found, DataError) and IMAGE in found.reason:
            _check_error(found, sample.origin, sample.id, {found.reason})
        elif isinstance(wanted, Refused):
            assert isinstance(found, Exception), f"accepted, wanted {sorted(wanted.reasons)}"
            _check_error(found, sample.origin, sample.id, wanted.reasons)
        else:
            if isinstance(found, Exception):
                raise AssertionError(f"refused: {type(found).__name__}: {found!s:.300}")
            _check_encoded(found, wanted, sample, case, speech)

    both = _outcome(text.encode_orders, sample)
    refusals = [wanted for wanted in expected if isinstance(wanted, Refused)]
    if refusals:
        matches(both, Refused(*(reason for refused in refusals for reason in refused.reasons)))
    else:
        for found, wanted in zip(both if not isinstance(both, Exception) else (both, both), (expected[0], expected[-1]),
                                 strict=True):
            matches(found, wanted)
    first = None
    for epoch in case.epochs:
        found = _outcome(text.encode, sample, epoch)
        agreeing = [n for n, wanted in enumerate(expected) if _agrees(found, wanted)]
        if len(expected) == 2 and len(agreeing) == 1:
            seen["image first" if agreeing == [0] else "image last"] += 1
        wanted = expected[agreeing[0] if agreeing else 0]
        matches(found, wanted)
        first = first or found
    return first if isinstance(first, EncodedSample) else None


def _agrees(found: Any, expected: Expected | Refused) -> bool:
    if isinstance(expected, Refused):
        return isinstance(found, DataError)
    return isinstance(found, EncodedSample) and list(found.input_ids) == expected.ids


def _check_line(
    case: Case, line: bytes, source: Any, index: int, origin: str, root: Path, speech: Speech, seen: Counter
) -> EncodedSample | None:
    found = _outcome(source.__getitem__, index)
    shown = sample_record(source, index, case.pipeline, case.epochs[0])
    json.dumps(shown).encode()
    try:
        value = _parse(line)
        if faults := _record_faults(value):
            raise Refused(*faults)
    except Refused as refused:
        known = _known_id(value) if not refused.reasons & {"not UTF-8 text", "not valid JSON"} else None
        assert isinstance(found, Exception), f"accepted, wanted {sorted(refused.reasons)}"
        _check_error(found, origin, known, refused.reasons)
        assert found.sample_id == known
        assert shown == {"id": known, "input_ids": None, "labels": None, "error": str(found)}
        seen[found.reason] += 1
        return None
    assert isinstance(found, Sample), f"refused: {type(found).__name__}: {found!s:.300}"
    assert (found.id, found.images, found.origin) == (_known_id(value), _paths(value, root), origin)
    assert [("q" if turn.role == "user" else "a", turn.text) for turn in found.turns] == _dialogue(value)
    encoded = _check_text(case, value, found, speech, seen)
    assert shown["id"] == found.id
    if encoded is None:
        error = _outcome(case.pipeline.encode, found, case.epochs[0])
        assert (shown["input_ids"], shown["labels"], shown["error"]) == (None, None, str(error))
        seen[error.reason] += 1
        return None
    assert (shown["input_ids"], shown["labels"]) == (list(encoded.input_ids), list(encoded.labels))
    assert shown["error"] is None
    return encoded


def _check_batch(group: Sequence[EncodedSample], packing: str) -> None:
    examples = [Example(encoded, [torch.zeros(3, 2, 2)] * len(encoded.images)) for encoded in group]
    batch = Collator(packing, torch.zeros(3, 2, 2), features=False, pad_id=0)(examples)
    ids, width = batch.input_ids.flatten().tolist(), batch.input_ids.shape[1]
    starts = [n * width for n in range(len(group))]
    if packing == "packed":
        starts = [sum(len(encoded.input_ids) for encoded in group[:n]) for n in range(len(group))]
        assert len(ids) == sum(len(encoded.input_ids) for encoded in group)
    rows, labels, images = [], [], []
    for start, encoded in zip(starts, group, strict=True):
        size = len(encoded.input_ids)
        assert ids[start : start + size] == list(encoded.input_ids), "a batch changes ids"
        assert batch.position_ids.flatten()[start : start + size].tolist() == list(range(size))
        # What comes first in a sample is predicted by nothing.
        learnt = [n for n in range(1, size) if encoded.labels[n] != -100]
        rows += [start + n - 1 for n in learnt]
        labels += [encoded.input_ids[n] for n in learnt]
        images += [start + n for n in range(size) if encoded.input_ids[n] == -200]
    assert batch.loss_rows.tolist() == (rows or [0])
    assert batch.loss_labels.tolist() == (labels or [-100])
    assert batch.num_supervised == len(labels)
    assert batch.row_plan.image_rows.tolist() == images


def _fuzz(folder: Path, speeches: dict[str, Speech], seeds: range) -> Counter:
    """Counts what was seen; fails with the first findings, each with its seed."""
    seen: Counter = Counter()
    findings: list[str] = []
    for start in range(seeds.start, seeds.stop, BATCH):
        accepted: list[tuple[int, EncodedSample]] = []
        drawn = [_draw_case(seed, speeches) for seed in range(start, min(start + BATCH, seeds.stop))]
        file = folder / f"{start}.jsonl"
        good = json.dumps(_golden()[0]).encode()  # by the first line the format is told
        file.write_bytes(b"\n".join([good, *(line for _, line, _ in drawn)]) + b"\n")
        source = open_source(str(file))
        number, index = 1, 0
        for case, line, kinds in drawn:
            seen.update(kinds)
            for piece in line.split(b"\n"):  # damage may break a line into two, or leave nothing of it
                number += 1
                if not piece.strip(b" \t\r\n"):
                    continue
                index += 1
                seen["records"] += 1
                speech = speeches[case.speech]
                try:
                    encoded = _check_line(case, piece, source, index, f"{file.name}:{number}", folder, speech, seen)
                except Exception as problem:  # noqa: BLE001 whatever escapes is a finding
                    drawn_of = vars(case.pipeline).items()
                    settings = {k: v for k, v in drawn_of if not k.startswith("_") and k != "tokenizer"}
                    what = f"{type(problem).__name__}: {problem}"
                    findings.append(f"seed {case.seed} {kinds} {case.speech} {settings}: {what}\n  {piece[:400]!r}")
                    continue
                if encoded is not None:
                    seen["accepted"] += 1
                    accepted.append((case.seed, encoded))
        assert len(source) == index + 1
        rng = Random(start)
        while accepted:
            group = [accepted.pop()[1] for _ in range(min(rng.randint(1, 6), len(accepted)))]
            for packing in ("packed", "padded"):
                _check_batch(group, packing)
            seen["batches"] += 1
        file.unlink()
        if len(findings) > 10:
            break
    if findings:
        pytest.fail(f"{len(findings)} findings:\n" + "\n".join(findings[:12]), pytrace=False)
    return seen


def _check_seen(seen: Counter, seeds: range) -> None:
    """Nothing passes on nothing."""
    assert seen["records"] >= 0.99 * len(seeds)
    assert 0.2 < seen["accepted"] / seen["records"] < 0.8, seen
    missing = [name for name in {*KINDS, *DAMAGES, *PARSE_REASONS, *ENCODE_REASONS} if not seen[name]]
    assert not missing, seen
    refused = sum(seen[reason] for reason in PARSE_REASONS | ENCODE_REASONS)
    assert seen["accepted"] + refused == seen["records"], "a record was neither accepted nor refused"
    front, back = seen["image first"], seen["image last"]
    assert front + back > len(seeds) / 50
    assert abs(front - back) < 5 * (front + back) ** 0.5, (front, back)
    assert seen["batches"] > len(seeds) / 40


def test_2000_mutated_records(tmp_path, speeches):
    seeds = range(2000)
    _check_seen(_fuzz(tmp_path, speeches, seeds), seeds)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(10_000), range(1_000_000, 1_050_000)], ids=["10000", "50000 more"])
def test_many_mutated_records(tmp_path, speeches, seeds):
    _check_seen(_fuzz(tmp_path, speeches, seeds), seeds)


def test_a_json_list_gives_the_samples_of_its_lines_or_one_error_that_names_it(tmp_path, speeches):
    seen: Counter = Counter()
    for seed in range(300):
        lines = [_draw_case(50 * seed + n, speeches)[1] for n in range(Random(seed).choice([1, 1, 2, 5]))]
        file = tmp_path / "train.json"
        file.write_bytes(b"[" + b",".join(lines) + b"]")
        try:
            values = _parse(file.read_bytes())
        except Refused:
            values = None
        found = _outcome(open_source, str(file))
        if values is None:
            assert type(found) is DataError, f"seed {seed}: {type(found).__name__} escaped: {found!s:.200}"
            assert str(found).startswith(str(file)), f"seed {seed}: {found}"
            seen["refused"] += 1
            continue
        for number, value in enumerate(values):
            sample, faults = _outcome(found.__getitem__, number), _record_faults(value)
            if faults:
                _check_error(sample, f"train.json[{number}]", _known_id(value), faults)
            else:
                assert sample == parse_record(value, f"train.json[{number}]", tmp_path)
                assert sample.images == _paths(value, tmp_path)
            seen["bad" if faults else "good"] += 1
    assert min(seen["refused"], seen["bad"], seen["good"]) > 20, seen


def test_a_number_of_thousands_of_digits_in_a_json_list(tmp_path):
    file = tmp_path / "train.json"
    file.write_text('[{"id": 1' + "0" * 5000 + "}]")
    found = _outcome(open_source, str(file))
    assert type(found) is DataError, f"{type(found).__name__} escaped"
    assert str(file) in str(found)


@pytest.mark.parametrize("depth", [*range(900, 1000, 3), 5000, 100_000])
@pytest.mark.parametrize("key", ["id", "image", "conversations"])
def test_deep_nesting_is_a_located_error(tmp_path, depth, key):
    deep = "[" * depth + "]" * depth
    file = tmp_path / "train.jsonl"
    file.write_text('{"id": "a", "conversations": [], ' + f'"{key}": {deep}' + "}\n")
    found = _outcome(open_source(str(file)).__getitem__, 0)
    assert type(found) is DataError, f"{type(found).__name__} escaped"
    assert str(found).startswith("train.jsonl:1")
