"""The quickstart's small LLM before training: a tokenizer made from the training texts, and a LLaMA config."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from transformers import LlamaConfig

from llava_ds.text.sentencepiece_tokenizer import build_sentencepiece_tokenizer

VOCAB_SIZE = 1536


def write_llm_init(folder: Path, texts: Sequence[str]) -> None:
    """Writes a transformers folder without weights: tokenizer and config of a LLaMA with 0.6 million parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    model_file = folder / "tokenizer.model"
    model_file.write_bytes(train_sentencepiece(texts))
    tokenizer = build_sentencepiece_tokenizer(model_file)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,  # copying a word from the context is learned sooner
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def train_sentencepiece(texts: Sequence[str]) -> bytes:
    """A SentencePiece BPE model of at most ``VOCAB_SIZE`` pieces, with LLaMA's ids for unk, bos and eos."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # the result must not depend on the machine
        minloglevel=2,
    )
    return model.getvalue()
