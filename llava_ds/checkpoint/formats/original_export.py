"""A model written as the original LLaVA code loads it: the LLM's folder, with projector and tower among its weights.

Its LLM has no word ``<image>``: the two words that transformers' layout adds are left out on the way here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.formats.clip import tower_of, write_clip
from llava_ds.checkpoint.formats.original import PROJECTOR_PREFIX, TOWER_FOLDER, TOWER_PREFIX
from llava_ds.checkpoint.formats.original_config import check_writable, original_config
from llava_ds.checkpoint.json_file import read_json, write_json
from llava_ds.checkpoint.keymap import LLM, PROJECTOR, TOWER, add_prefix, list_some, strip_prefix, tower_to_clip
from llava_ds.checkpoint.layout import FileRecord
from llava_ds.checkpoint.processor import PAD_TOKEN
from llava_ds.checkpoint.stored_model import StoredModel, copy_tokenizer_model
from llava_ds.checkpoint.writer import Progress, write_sharded
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError
from llava_ds.models.build import load_tokenizer
from llava_ds.text.sentencepiece_tokenizer import is_llama_like
from llava_ds.text.templates import CHAT_TEMPLATE


def write_original(
    model: StoredModel, folder: Path, max_shard_bytes: int, progress: Progress | None = None,
    final: Path | None = None,
) -> tuple[dict[str, FileRecord], list[str]]:
    """Writes a folder that the original code loads; ``final`` is where it will stand, if not at ``folder``.

    The code loads its tower by ``mm_vision_tower``: where that is not a published one by name, the tower is written
    as a folder of its own as well. Its slow tokenizer is made of the LLM's SentencePiece file, which goes along.

    Returns the records of the files with tensors, and what a user should know. Raises ConfigError for an LLM that the
    code does not know, or with settings that it lacks.
    """
    check_writable(model)
    num_rows, num_words = own_vocabulary(model)
    weights = strip_prefix(model.weights, LLM)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name].rows(0, num_rows)
    weights |= add_prefix(strip_prefix(model.weights, PROJECTOR), PROJECTOR_PREFIX)
    weights |= add_prefix(tower_to_clip(strip_prefix(model.weights, TOWER)), TOWER_PREFIX)
    tensors = [(name, value.cast(model.dtype)) for name, value in weights.items()]
    records = write_sharded(folder, tensors, max_shard_bytes, progress)
    notes = []
    tower_name = model.tower_name
    if tower_name is None:
        (folder / TOWER_FOLDER).mkdir()
        inner = write_clip(tower_of(model), folder / TOWER_FOLDER, model.dtype, progress)
        records |= {f"{TOWER_FOLDER}/{name}": record for name, record in inner.items()}
        tower_name = str((final or folder).absolute() / TOWER_FOLDER)
        notes.append(
            f"the original code loads the tower from mm_vision_tower={tower_name}; where the folder moves, change that "
            "in its config.json"
        )
    write_json(folder / "config.json", original_config(model, num_rows, tower_name))
    notes += _write_tokenizer(model, folder, num_words)
    if "llava" not in (final or folder).name.lower():
        notes.append("the original code goes by the folder's name: give it one with 'llava' in it")
    if model.zero_features:
        notes.append("the model was trained blind (model.zero_features); other code will show it the pictures")
    return records, notes


def own_vocabulary(model: StoredModel) -> tuple[int, int]:
    """Rows of the word embedding, and words of the tokenizer, without those that transformers' layout adds.

    That are ``<image>`` and ``<pad>`` at the tokenizer's very end; their rows, and those that fill up the last 64, are
    taken away where nothing else explains them.
    """
    rows, words = model.text_config["vocab_size"], len(model.tokenizer)
    vocabulary = model.tokenizer.get_added_vocab()
    added = sorted(vocabulary[word] for word in (IMAGE_PLACEHOLDER, PAD_TOKEN) if word in vocabulary)
    if IMAGE_PLACEHOLDER in vocabulary:
        for last in (added, [vocabulary[IMAGE_PLACEHOLDER]]):
            first = words - len(last)
            if last == list(range(first, words)):
                return (first if rows in (words, -(-words // 64) * 64) else rows), first
    return rows, words


def _write_tokenizer(model: StoredModel, folder: Path, num_words: int) -> list[str]:
    """Writes the tokenizer's first ``num_words`` words; returns what a user should know.

    Raises CheckpointError when what was written reads back as another tokenizer.
    """
    tokenizer = model.tokenizer
    expected = {word: number for word, number in tokenizer.get_vocab().items() if number < num_words}
    if model.tokenizer_model and is_llama_like(model.tokenizer_model):
        copy_tokenizer_model(model, folder)
        write_json(folder / "tokenizer_config.json", _slow_tokenizer_config(model, num_words))
        if load_tokenizer(str(folder)).get_vocab() == expected:
            return []
        (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    if model.template != CHAT_TEMPLATE:  # an exported processor's, which would not be asked for its pictures here
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    _cut_vocabulary(folder, num_words)
    found = load_tokenizer(str(folder)).get_vocab()
    if found != expected:
        differing = sorted(word for word in found.keys() | expected.keys() if found.get(word) != expected.get(word))
        raise CheckpointError(
            f"{folder}: the tokenizer reads back with {len(found)} words, {len(expected)} were written; they differ in "
            f"{list_some(differing)}"
        )
    if model.text_config["model_type"] == "mistral":
        return []
    return [
        "there is no tokenizer.model that makes this tokenizer, and the original code's LLaMA asks for one: copy the "
        "LLM's into the folder"
    ]


def _slow_tokenizer_config(model: StoredModel, num_words: int) -> dict[str, Any]:
    tokenizer = model.tokenizer
    added = {
        str(number): {"content": token.content, "special": token.special, "lstrip": token.lstrip,
                      "rstrip": token.rstrip, "normalized": token.normalized, "single_word": token.single_word}
        for number, token in sorted(tokenizer.added_tokens_decoder.items()) if number < num_words
    }
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    kept = {name: text for name, text in names.items()
            if text is not None and tokenizer.convert_tokens_to_ids(text) < num_words}
    config = {
        "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "add_bos_token": True,
        "add_eos_token": False, "legacy": True, "model_max_length": tokenizer.model_max_length, "padding_side": "right",
        **kept,
    }
    return config | ({"chat_template": tokenizer.chat_template} if model.template == CHAT_TEMPLATE else {})


def _cut_vocabulary(folder: Path, num_words: int) -> None:
    """Takes the added words from ``num_words`` on out of a saved fast tokenizer."""
    file = folder / "tokenizer.json"
    raw = read_json(file)
    gone = {token["content"] for token in raw["added_tokens"] if token["id"] >= num_words}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < num_words]
    file.write_text(json.dumps(raw, ensure_ascii=False) + "\n")
    file = folder / "tokenizer_config.json"
    config = {key: value for key, value in read_json(file).items()
              if not (isinstance(value, str) and value in gone) and key not in ("processor_class", "image_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), list):
            config[key] = [word for word in config[key] if word not in gone]
        elif isinstance(config.get(key), dict):
            config[key] = {name: word for name, word in config[key].items() if word not in gone}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            number: token for number, token in config["added_tokens_decoder"].items() if int(number) < num_words
        }
    write_json(file, config)
