"""The official trainer's 12 steps of stage 1, through this project's collator, model, optimizer and schedule."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_ds.checkpoint.keymap import (
    HF_PROJECTOR,
    LLM,
    PROJECTOR,
    TOWER,
    add_prefix,
    llava_hf_names,
    projector_from_hf,
    strip_prefix,
    tower_from_clip,
)
from llava_ds.checkpoint.tensor_files import open_tensors
from llava_ds.config import TrainConfig
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.engine.optim import build_optimizer, build_scheduler
from llava_ds.models.build import build_llm_from_config
from llava_ds.models.freezing import apply_freezing
from llava_ds.models.llava import Llava
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import TowerSpec, build_tower_from_spec
from llava_ds.schema import EncodedSample

NUM_PATCHES = 9
# Between two versions of torch and transformers, in fp32: a plain transformers model is within 2e-6 and 4e-6.
LOSS_TOLERANCE, PROJECTOR_TOLERANCE = 5e-6, 1e-5


@pytest.fixture(scope="module")
def folder() -> Path:
    root = os.environ.get("LLAVA_DS_GOLDEN")
    if not root:
        pytest.skip("LLAVA_DS_GOLDEN does not name the folder of the golden files (a 17 MB model)")
    return Path(root) / "trajectory"


def _model(folder: Path) -> Llava:
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    spec = TowerSpec(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        norm_eps=vision["layer_norm_eps"],
        act=vision["hidden_act"],
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
        interpolation="bicubic",
    )
    tower = build_tower_from_spec(spec, config["vision_feature_layer"])
    llm = build_llm_from_config(config["text_config"], "sdpa", torch.float32)
    model = Llava(tower, build_projector("mlp2x_gelu", spec.width, llm.config.hidden_size, seed=0), llm)
    hf = llava_hf_names(open_tensors([folder / "model.safetensors"]))
    weights = {
        **add_prefix(tower_from_clip(strip_prefix(hf, "vision_tower.vision_model.")), TOWER),
        **add_prefix(projector_from_hf(strip_prefix(hf, HF_PROJECTOR), "mlp"), PROJECTOR),
        **add_prefix(strip_prefix(hf, "language_model."), LLM),
    }
    result = model.load_state_dict({name: tensor.whole() for name, tensor in weights.items()}, strict=False)
    assert not result.missing_keys and not result.unexpected_keys, result
    return model


def _examples(arrays, step: int) -> list[Example]:
    key = f"step{step:02d}_"
    examples = []
    rows = zip(arrays[key + "input_ids"], arrays[key + "labels"], strict=True)
    for row, (ids, labels) in enumerate(rows):
        length = int(np.flatnonzero(ids)[-1]) + 1  # the rest is padding, id 0
        new_ids: list[int] = []
        new_labels: list[int] = []
        for token, label in zip(ids[:length].tolist(), labels[:length].tolist(), strict=True):
            count = NUM_PATCHES if token == IMAGE_TOKEN_INDEX else 1
            new_ids += [token] * count
            new_labels += [label] * count
        has_image = bool(arrays[key + "images_per_row"][row])
        pixels = [torch.from_numpy(arrays[key + "pixel_values"][row])] if has_image else []
        encoded = EncodedSample(f"{step}-{row}", ("x",) * has_image, tuple(new_ids), tuple(new_labels))
        examples.append(Example(encoded, pixels))
    return examples


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_official_trajectory_is_reproduced(folder, packing):
    golden = json.loads((folder / "stage1.json").read_text())
    arrays = np.load(folder / "stage1.npz")
    model = _model(folder)
    apply_freezing(model, ["projector"])
    train = TrainConfig(
        trainable=["projector"], global_batch_size=4, micro_batch_size=4, learning_rate=1e-3, warmup_ratio=0.03
    )
    optimizer = build_optimizer(model, train)
    scheduler = build_scheduler(optimizer, train, num_steps=12)
    collator = Collator(packing, torch.zeros(3, 42, 42), features=False)
    losses, rates = [], []
    for step in range(12):
        batch = collator(_examples(arrays, step))
        rates.append(optimizer.param_groups[0]["lr"])
        loss = model(batch) / batch.num_supervised
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.projector.parameters(), train.gradient_clipping)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert len(golden["losses"]) == 12
    np.testing.assert_allclose(rates, [pair[0] for pair in golden["lrs"]], rtol=1e-9)
    np.testing.assert_allclose(losses, golden["losses"], rtol=0, atol=LOSS_TOLERANCE)
    for name, value in model.projector.state_dict().items():
        expected = arrays[f"final__model.mm_projector.{name}"]
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=PROJECTOR_TOLERANCE)
