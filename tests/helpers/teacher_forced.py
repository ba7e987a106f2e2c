"""What an evaluation during training must find, computed by the book: one sample at a time, logits at every row."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.schema import EncodedSample


def evaluate_reference(model: Any, samples: Iterable[tuple[EncodedSample, torch.Tensor]]) -> dict[str, float]:
    """The numbers of encoded samples with their images, [I, 3, H, W] levels each, by the names of metrics.jsonl."""
    model.eval()
    losses, right, answers, num_samples = [], [], [], 0
    for encoded, pixels in samples:
        num_samples += 1
        labels = torch.tensor(encoded.labels[1:])
        with torch.no_grad():
            logits = model.llm(inputs_embeds=_embeds(model, encoded, pixels)).logits[0, :-1].float()
        supervised = labels != IGNORE_INDEX
        losses.append(F.cross_entropy(logits[supervised], labels[supervised], reduction="none").double())
        hits = logits.argmax(-1) == labels
        right.append(hits[supervised])
        for is_answer, places in groupby(range(len(labels)), key=lambda place, s=supervised: bool(s[place])):
            if is_answer:
                answers.append(all(hits[place] for place in places))
    return {
        "eval_loss": float(torch.cat(losses).mean()),
        "eval_token_accuracy": float(torch.cat(right).double().mean()),
        "eval_teacher_forced_exact": sum(answers) / len(answers),
        "eval_num_samples": num_samples,
        "eval_num_answers": len(answers),
        "eval_num_tokens": len(torch.cat(losses)),
    }


def _embeds(model: Any, encoded: EncodedSample, pixels: torch.Tensor) -> torch.Tensor:
    """[1, S, D]: words looked up, patches projected, in the order of the ids."""
    ids = torch.tensor(encoded.input_ids)
    embeds = model.llm.get_input_embeddings()(ids.clamp(min=0)).clone()
    if len(pixels):
        features = model.projector(model.patch_features(pixels))
        embeds[ids == IMAGE_TOKEN_INDEX] = features.flatten(0, 1)
    return embeds[None]
