"""A fast transformers tokenizer with exactly the ids of a SentencePiece BPE model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_ds.errors import ConfigError

_SPECIAL_NAMES = ("unk_token", "bos_token", "eos_token", "pad_token")


def build_sentencepiece_tokenizer(model_file: Path, **special_tokens: str) -> Any:
    """The tokenizer of a ``tokenizer.model``.

    The order of merges is the order of SentencePiece's scores. transformers (5.23) orders them by id instead when it
    reads a ``tokenizer.model``, which gives wrong ids for runs of spaces.

    Raises ConfigError when the file is not a SentencePiece model.
    """
    source = _read_model(model_file)
    pieces = [source.id_to_piece(number) for number in range(len(source))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number, piece in enumerate(pieces):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(source.get_score(number), pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])
    core = Tokenizer(
        models.BPE(
            vocab, [pair for _, pair in merges], unk_token=pieces[source.unk_id()], fuse_unk=True, byte_fallback=True
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {
        "unk_token": pieces[source.unk_id()],
        "bos_token": pieces[source.bos_id()],
        "eos_token": pieces[source.eos_id()],
        **special_tokens,
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **names)


def is_llama_like(model_file: Path) -> bool:
    """Whether ``build_sentencepiece_tokenizer`` fits: BPE, one leading space, all other text as it stands.

    Raises ConfigError when the file is not a SentencePiece model.
    """
    source = _read_model(model_file)
    # The scores of BPE count its merges; those of the other kinds (T5's unigram) are logarithms of probabilities.
    is_bpe = all(source.get_score(number).is_integer() for number in range(len(source)))
    return is_bpe and source.normalize("\ufb01  a ") == "▁\ufb01▁▁a▁"


def load_published_tokenizer(find: Callable[[str], Path | None]) -> Any:
    """The tokenizer of a published model that has ``tokenizer.model`` (see ``is_llama_like``) and no tokenizer.json.

    ``find`` gives the path of one of the model's files, or None. Special tokens, ``model_max_length``, chat template
    and added tokens are those that the files beside ``tokenizer.model`` state.

    Raises ConfigError when one of the files cannot be read, or an added token has an id that cannot be kept.
    """
    model_file = find("tokenizer.model")
    if model_file is None:
        raise ConfigError("no tokenizer.model was found")
    stated = _read_json(find("tokenizer_config.json"))
    special = _read_json(find("special_tokens_map.json"))
    names = {name: _content(special.get(name) or stated.get(name)) for name in _SPECIAL_NAMES}
    tokenizer = build_sentencepiece_tokenizer(model_file, **{name: text for name, text in names.items() if text})
    added = {_content(token): int(number) for number, token in stated.get("added_tokens_decoder", {}).items()}
    _add_tokens(tokenizer, added | _read_json(find("added_tokens.json")), model_file)
    if stated.get("model_max_length"):
        tokenizer.model_max_length = int(stated["model_max_length"])
    template_file = find("chat_template.jinja")
    tokenizer.chat_template = template_file.read_text() if template_file else stated.get("chat_template")
    return tokenizer


def _read_model(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(str(model_file))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{model_file} is not a SentencePiece model: {error}") from error


def _read_json(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}\n  Download the model again.") from error


def _content(token: Any) -> Any:
    """The text of a token, which stands as text or as a record in the files."""
    return token["content"] if isinstance(token, dict) else token


def _add_tokens(tokenizer: Any, added: dict[str, int], model_file: Path) -> None:
    """Adds the tokens in the order of their ids, and checks that each has its id then."""
    for text, number in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_tokens([text], special_tokens=True)
        got = tokenizer.convert_tokens_to_ids(text)
        if got != number:
            raise ConfigError(
                f"{model_file.parent}: the added token {text!r} shall have id {number} but gets {got}.\n"
                "  The ids must follow those of tokenizer.model without a gap: fix added_tokens.json (or "
                "added_tokens_decoder in tokenizer_config.json)."
            )
