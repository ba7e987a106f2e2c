"""A fast transformers tokenizer with exactly the ids of a SentencePiece BPE model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_ds.errors import ConfigError


def build_sentencepiece_tokenizer(model_file: Path, **special_tokens: str) -> Any:
    """The tokenizer of a ``tokenizer.model``.

    The order of merges is the order of SentencePiece's scores. transformers (5.23) orders them by id instead when it
    reads a ``tokenizer.model``, which gives wrong ids for runs of spaces.

    Raises ConfigError when the file is not a SentencePiece model.
    """
    try:
        source = sentencepiece.SentencePieceProcessor(str(model_file))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{model_file} is not a SentencePiece model: {error}") from error
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
