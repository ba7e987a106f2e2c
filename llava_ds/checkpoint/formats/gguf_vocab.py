"""Tokenizer and chat template as llama.cpp reads them: its SentencePiece kind, which merges by the pieces' scores."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llava_ds.checkpoint.processor import chat_template
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import begins_with_bos, spaces_after_special, stop_id

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of words."""

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_NO_SCORE = -1e9  # of words that no merge makes, and of rows without a word; llama.cpp's own converter: -10000
# An image's mark is "<__media__>" or, in a server, "<__media_" and random letters. It stands in the message's text,
# without the line break behind an image that LLaVA's prompts have.
_MARKS = (
    "{% set mark = namespace(text='<__media__>') %}{% for m in messages %}"
    "{% if m['content'] is string and '<__media' in m['content'] %}"
    "{% set mark.text = '<__media' + m['content'].split('<__media')[1].split('__>')[0] + '__>' %}"
    "{% endif %}{% endfor %}"
    "{% set marked = namespace(messages=[]) %}{% for m in messages %}{% set text = namespace(all=m['content']) %}"
    "{% if m['content'] is string and mark.text in m['content'] %}{% set text.all = '' %}"
    "{% for chunk in m['content'].split(mark.text) %}{% if not loop.first %}"
    "{% set text.all = text.all + mark.text + ('' if chunk.startswith('\\n') else '\\n') %}{% endif %}"
    "{% set text.all = text.all + chunk %}{% endfor %}{% endif %}"
    "{% set marked.messages = marked.messages + [{'role': m['role'], 'content': text.all}] %}{% endfor %}"
    "{% set messages = marked.messages %}"
)


def describe_vocabulary(tokenizer: Any, template_name: str, num_words: int) -> dict[str, Any]:
    """The ``tokenizer.*`` metadata for the first ``num_words`` words, what an export added beyond them left out.

    Rows without a word are called ``[PAD<row>]``, as by llama.cpp's own converter.

    Raises CheckpointError for a tokenizer that llama.cpp's SentencePiece kind does not reproduce.
    """
    template = resolve_template(template_name, tokenizer)
    tokens, scores, types = list_words(tokenizer, num_words)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": begins_with_bos(tokenizer),
        "tokenizer.ggml.add_eos_token": False,
        # llama.cpp puts its space behind special tokens, too. Our templates, where there is none, write the space out
        # at the beginning and behind images.
        "tokenizer.ggml.add_space_prefix": template.is_tokenizers_own and spaces_after_special(tokenizer),
        "tokenizer.chat_template": llama_cpp_template(template, tokenizer),
    }
    ids = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id, "eot": stop_id(tokenizer, template),
    }
    metadata |= {
        f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()
        if number is not None and number < num_words
    }
    return metadata


def list_words(tokenizer: Any, num_words: int) -> tuple[list[str], list[float], list[int]]:
    """Text, score and kind of every word; the scores are in the order of the tokenizer's merges.

    Raises CheckpointError as ``describe_vocabulary``.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    problems = _find_problems(tokenizer, core)
    scores = {} if problems else _score_pieces(core["model"], problems)
    if problems:
        raise CheckpointError(
            "llama.cpp's SentencePiece kind would not tokenize as this model's tokenizer does:\n  "
            + "\n  ".join(problems)
            + "\n  Only tokenizers like those of LLaMA 1 and 2, Vicuna and the first Mistral are written to GGUF. For "
            "others convert to transformers, and the text model from there with llama.cpp's convert_hf_to_gguf.py."
        )
    words = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    special, unknown = set(tokenizer.all_special_ids), tokenizer.unk_token_id

    def kind(number: int) -> int:
        if number not in words:
            return UNUSED
        if number == unknown:
            return UNKNOWN
        if _BYTE_PIECE.fullmatch(words[number]):
            return BYTE
        if added.get(number) or number in special:
            return CONTROL
        return USER_DEFINED if number in added else NORMAL

    tokens = [words.get(number, f"[PAD{number}]") for number in range(num_words)]
    return tokens, [scores.get(token, _NO_SCORE) for token in tokens], [kind(number) for number in range(num_words)]


def _find_problems(tokenizer: Any, core: dict[str, Any]) -> list[str]:
    model = core["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        fallback = "with" if model.get("byte_fallback") else "without"
        return [f"it is {model['type']} {fallback} fallback to bytes; BPE with it is needed"]
    missing = [piece for piece in map("<0x{:02X}>".format, range(256)) if piece not in model["vocab"]]
    problems = [f"{len(missing)} of 256 pieces for bytes are missing, {missing[0]} first"] if missing else []
    text = "\ufb01  a "
    backend = tokenizer.backend_tokenizer
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    cut = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]
    if [part.removeprefix("▁") for part in cut] != ["\ufb01▁▁a▁"]:
        problems.append(f"{text!r} reaches its merges as {cut}; one text with every space as '▁' is needed")
    return problems


def _score_pieces(model: dict[str, Any], problems: list[str]) -> dict[str, float]:
    """One score a piece; adds to ``problems`` where the merges are not told by scores of pieces."""
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made: list[str] = []
    for left, right in merges:
        if not made or made[-1] != left + right:
            made.append(left + right)
    scores = {piece: -float(rank) for rank, piece in enumerate(made)}
    scattered = sorted({piece for rank, piece in enumerate(made) if scores[piece] != -rank})
    if scattered:
        problems.append(f"the merges into {_some(scattered)} do not stand together, so no score gives their order")
    vocab, known = model["vocab"], set(merges)
    unmerged = [
        piece for piece in vocab
        if any(piece[:cut] in vocab and piece[cut:] in vocab and (piece[:cut], piece[cut:]) not in known
               for cut in range(1, len(piece)))
    ]
    if unmerged:
        problems.append(f"not all pairs of words that make {_some(unmerged)} are merged; llama.cpp merges all")
    return scores


def _some(pieces: Sequence[str]) -> str:
    more = f" and {len(pieces) - 3} more" if len(pieces) > 3 else ""
    return ", ".join(map(repr, pieces[:3])) + more


def llama_cpp_template(template: Any, tokenizer: Any) -> str:
    """The chat template (see ``chat_template``) for llama.cpp, which leaves a mark of its own where an image stands."""
    return _MARKS + chat_template(template, tokenizer).replace(f"'{IMAGE_PLACEHOLDER}'", "mark.text")
