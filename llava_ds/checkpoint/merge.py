"""From a run to one folder that transformers loads as LlavaForConditionalGeneration, and that llava_ds loads too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import LlavaImageProcessor, LlavaProcessor

from llava_ds.checkpoint.keymap import choose_projector_export, to_llava_hf
from llava_ds.checkpoint.layout import commit, write_safetensors_stream
from llava_ds.checkpoint.load import MERGED_FILE, LoadedModel, load_model, stored_dtype
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError
from llava_ds.models.llava import Llava
from llava_ds.models.vision_tower import TowerSpec
from llava_ds.text.chat_template import chat_template_text, resolve_template
from llava_ds.text.encode import adds_leading_space, begins_with_bos, is_token
from llava_ds.text.templates import BOS, EOS, AnyTemplate, Special, Template

PAD_TOKEN = "<pad>"
_FLATTEN = (  # a message's content is text, or a list of images and texts
    "{% macro flatten(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}"
)
_FLATTEN_MESSAGES = (  # before a tokenizer's own template, which may know texts only
    "{% set flat = namespace(all=[]) %}{% for m in messages %}"
    "{% set flat.all = flat.all + [{'role': m['role'], 'content': flatten(m['content'])}] %}{% endfor %}"
    "{% set messages = flat.all %}"
)
_ACTS = {"mlp": "gelu", "relu_pair": "relu", "identity": "linear"}


def merge(source: Path, out: Path) -> str:
    """Writes the merged folder of a run or step, in the run's precision; returns how the projector was written.

    The folder appears whole or not at all. Its model has two more words than the run's LLM, ``<image>`` and
    ``<pad>``, as transformers needs them; their rows are never read, and never the likeliest next word.

    Raises CheckpointError when ``out`` exists or cannot be made, or the source is not complete.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; give another folder, or remove it first")
    loaded = load_model(source, dtype=stored_dtype(source))
    model, spec = loaded.model, loaded.model.vision_tower.spec
    width = model.llm.config.get_text_config().hidden_size
    kind = "linear" if hasattr(model.projector, "weight") else "mlp2x_gelu"
    export = choose_projector_export(kind, spec.width, width)
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be made: {error}; give another folder") from error
    try:
        num_words = _save_processor(work, loaded, spec)
        _grow_vocabulary(model, num_words)
        weights = list(to_llava_hf(model, export))
        header = [(name, value.dtype, tuple(value.shape)) for name, value in weights]
        write_safetensors_stream(work / "model.safetensors", weights, header)
        _write_json(work / "config.json", _hf_config(loaded, spec, export))
        facts = {
            "tower": spec.as_dict(),
            "select_layer": model.vision_tower.block - spec.layers,
            "projector": kind,
            "projector_export": export,
            "zero_features": model.zero_features,
            "template": loaded.template,
            "image_aspect_ratio": loaded.image_aspect_ratio,
        }
        _write_json(work / MERGED_FILE, facts)
        commit(work)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return export


def chat_template(template: AnyTemplate, tokenizer: Any) -> str:
    """A template as the Jinja text that transformers renders; images stand where the messages have them.

    Where the tokenizer begins a text with a space (see ``adds_leading_space``), beside special tokens it does not, so
    the space is written out: at the beginning of the text and after an image, as ``encode`` has it.
    """
    if not isinstance(template, Template):
        return _FLATTEN + _FLATTEN_MESSAGES + chat_template_text(tokenizer)
    space = " " if adds_leading_space(tokenizer) else ""
    lead, tail = template.answer.split("{}")
    between = "".join(map(_literal, template.between))
    if template.drops_question:
        question, lead, begin = "{{ '<image>' * (text.split('<image>') | length - 1) }}", space + lead, ""
    else:
        goes_on = "true" if _text_follows_question(template, tokenizer) else "false"
        question = (
            "{% for chunk in text.split('<image>') %}{% if not loop.first %}{{ '<image>' }}"
            f"{{% if chunk or loop.last and {goes_on} %}}{_literal(space)}{{% endif %}}{{% endif %}}{{{{ chunk }}}}"
            "{% endfor %}"
        )
        opens = next(iter((*template.begin, *template.user)))
        begin = "" if isinstance(opens, Special) and is_token(tokenizer, opens) else _literal(space)
    user = "".join(question.join(map(_literal, part.split("{}"))) if isinstance(part, str) else _literal(part)
                   for part in template.user)
    user += "".join(map(_literal, template.assistant))
    answer = _literal(lead) + "{{ text }}" + _literal(tail) + _literal(template.stop)
    refusal = f"the template {template.name} knows the roles user and assistant only, not "
    return (
        _FLATTEN
        + ("{{ bos_token }}" if begins_with_bos(tokenizer) else "")
        + begin
        + "".join(map(_literal, template.begin))
        + "{% for m in messages %}{% set text = flatten(m['content']) %}{% if m['role'] == 'user' %}"
        + ("{% if not loop.first %}" + between + "{% endif %}" if between else "")
        + user
        + "{% elif m['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ raise_exception(" + json.dumps(refusal) + " ~ m['role']) }}{% endif %}{% endfor %}"
    )


def _text_follows_question(template: Template, tokenizer: Any) -> bool:
    """Whether text stands right behind a question, so that behind a last image a run of text begins."""
    parts = (*template.user, *template.assistant)
    number = next(n for n, part in enumerate(parts) if isinstance(part, str) and "{}" in part)
    following = parts[number + 1]
    is_text = isinstance(following, str) or not is_token(tokenizer, following)
    return not str(parts[number]).endswith("{}") or is_text


def _literal(part: str | Special) -> str:
    if isinstance(part, Special) and part.kind in (BOS, EOS):
        return "{{ " + f"{part.kind}_token" + " }}"
    text = part.kind if isinstance(part, Special) else part
    return "{{ " + json.dumps(text) + " }}" if text else ""


def _save_processor(out: Path, loaded: LoadedModel, spec: TowerSpec) -> int:
    """Writes tokenizer, image processor and chat template; returns the number of words."""
    tokenizer = loaded.tokenizer
    template = resolve_template(loaded.template, tokenizer)
    rendered = chat_template(template, tokenizer)
    if not template.is_tokenizers_own:
        _add_space_once(tokenizer)
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    images = LlavaImageProcessor(
        do_pad=loaded.image_aspect_ratio == "pad",
        size={"shortest_edge": spec.image_size},
        crop_size={"height": spec.image_size, "width": spec.image_size},
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
        resample=3 if spec.interpolation == "bicubic" else 2,
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_PLACEHOLDER,
        num_additional_image_tokens=1,
        chat_template=rendered,
    ).save_pretrained(out)
    return len(tokenizer)


def _add_space_once(tokenizer: Any) -> None:
    """Where a normalizer puts the leading space before every run of text, puts it before the whole text only.

    After a special token within the text there was none in training (see ``encode``).
    """
    core = tokenizer.backend_tokenizer
    if core.normalizer is not None and core.normalizer.normalize_str("\ufb01  a ") == "▁\ufb01▁▁a▁":
        core.normalizer = None
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)


def _grow_vocabulary(model: Llava, num_words: int) -> None:
    rows = model.llm.get_input_embeddings().weight.shape[0]
    if num_words <= rows:
        return
    model.llm.resize_token_embeddings(num_words, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for table in (model.llm.get_input_embeddings(), model.llm.get_output_embeddings()):
            # A mean of logits is never the largest: no answer changes. Random rows could win.
            table.weight[rows:] = table.weight[:rows].mean(0)


def _hf_config(loaded: LoadedModel, spec: TowerSpec, export: str) -> dict[str, Any]:
    model, tokenizer = loaded.model, loaded.tokenizer
    text = model.llm.config.get_text_config()
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": str(model.llm.dtype).removeprefix("torch."),
        "image_seq_length": spec.num_patches,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD_TOKEN),
        "projector_hidden_act": _ACTS[export],
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(text.tie_word_embeddings),
        "vision_feature_layer": model.vision_tower.block - spec.layers,
        "vision_feature_select_strategy": "default",
        "text_config": text.to_dict(),
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": spec.width,
            "intermediate_size": spec.mlp_width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "image_size": spec.image_size,
            "patch_size": spec.patch_size,
            "hidden_act": spec.act,
            "layer_norm_eps": spec.norm_eps,
            "projection_dim": spec.width,
        },
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
