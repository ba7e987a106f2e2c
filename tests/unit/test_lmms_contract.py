"""What lmms-eval's adapter for transformers' LLaVA does with an exported folder, step by step: our answers come out.

In our own words after the sources of `llava_hf` in lmms-eval 0.7.3, its chat and its simple form. lmms-eval itself runs
in tests/e2e/test_lmms_eval.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from llava_ds.checkpoint.merge import merge
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.inference.session import Sampling, load_session
from llava_ds.schema import Turn
from llava_ds.text.encode import encode_prompt
from tests.helpers.tiny import write_run, write_world

NUM_TOKENS = 12
QUESTIONS = {"0.png": "What is this?", "1.png": "Where is the fox?", "4.png": "Is this a fox?"}


def _chat_prompt(processor: Any, question: str, picture: Image.Image) -> str:
    """The picture stands in the message as a part of its own."""
    parts = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )


def _simple_prompt(processor: Any, question: str, _picture: Image.Image) -> str:
    """The message is one text, and the template is the tokenizer's: without one, the adapter takes Vicuna's."""
    assert processor.tokenizer.chat_template is not None
    message = {"role": "user", "content": f"<image>\n{question}"}
    return processor.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("prompt", [_chat_prompt, _simple_prompt])
@pytest.mark.parametrize("template", ["short", "v1", "llava_llama_2"])
def test_the_adapter_gets_our_answers(tmp_path, prompt, template):
    world = write_world(tmp_path)
    folder = tmp_path / "merged"
    merge(write_run(world, data__template=template), folder)
    assert AutoConfig.from_pretrained(folder).model_type == "llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map="cpu")
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    end = processor.tokenizer.eos_token_id
    session = load_session(folder)
    answers = {}
    for name, question in QUESTIONS.items():
        path = Path(world / "data" / name)
        picture = Image.open(path).convert("RGB")
        text = prompt(processor, question, picture)
        inputs = processor(images=[picture], videos=None, text=text, return_tensors="pt").to("cpu", model.dtype)
        turns = [Turn("user", f"<image>\n{question}")]
        words = torch.where(inputs["input_ids"] == model.config.image_token_id, IMAGE_TOKEN_INDEX, inputs["input_ids"])
        assert words[0].tolist() == encode_prompt(turns, session.tokenizer, session.template, 9)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, num_beams=1, use_cache=True,
                                 max_new_tokens=NUM_TOKENS, pad_token_id=end, eos_token_id=end)
        new = ids[:, inputs["input_ids"].shape[-1] :]
        answers[name] = processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()
        (ours,) = session.answer_batch([turns], [[path]], Sampling(max_new_tokens=NUM_TOKENS))
        assert answers[name] == ours
    assert len(answers) == 3 and all(answers.values())
