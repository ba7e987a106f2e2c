"""What stands beside an exported model's weights: tokenizer, image processor, chat template, generation settings."""

from __future__ import annotations

import copy
import json
from typing import Any

from tokenizers import pre_tokenizers
from transformers import GenerationConfig, LlavaImageProcessor, LlavaProcessor

from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError
from llava_ds.text.chat_template import chat_template_text, resolve_template
from llava_ds.text.encode import adds_leading_space, begins_with_bos, is_token, stop_id
from llava_ds.text.templates import BOS, EOS, AnyTemplate, Special, Template

PAD_TOKEN = "<pad>"
MAX_NEW_TOKENS = 256
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


def build_processor(model: StoredModel) -> Any:
    """transformers' LlavaProcessor of a model: its tokenizer has ``<image>`` and ``<pad>``, its pixels are ours."""
    tokenizer = copy.deepcopy(model.tokenizer)
    template = resolve_template(model.template, tokenizer)
    rendered = chat_template(template, tokenizer)
    if not template.is_tokenizers_own:
        _add_space_once(tokenizer)
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    spec = model.tower
    images = LlavaImageProcessor(
        do_pad=model.image_aspect_ratio == "pad",
        size={"shortest_edge": spec.image_size},
        crop_size={"height": spec.image_size, "width": spec.image_size},
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
        resample=3 if spec.interpolation == "bicubic" else 2,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_PLACEHOLDER,
        num_additional_image_tokens=1,
        chat_template=rendered,
    )


def generation_settings(model: StoredModel, tokenizer: Any) -> dict[str, Any]:
    """What ``generation_config.json`` says: greedy answers that end as the template's do.

    A template that ends answers with a text has none that transformers stops at by itself: there it is the tokenizer's
    end of sequence. ``tokenizer`` is the processor's.

    Raises CheckpointError when transformers would not take it.
    """
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop_id(tokenizer, resolve_template(model.template, model.tokenizer)),
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        GenerationConfig(**settings).validate(strict=True)
    except ValueError as error:
        raise CheckpointError(f"transformers does not take {settings} to generate with: {error}") from error
    return settings


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


def _add_space_once(tokenizer: Any) -> None:
    """Where a normalizer puts the leading space before every run of text, puts it before the whole text only.

    After a special token within the text there was none in training (see ``encode``).
    """
    core = tokenizer.backend_tokenizer
    if core.normalizer is not None and core.normalizer.normalize_str("\ufb01  a ") == "▁\ufb01▁▁a▁":
        core.normalizer = None
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
