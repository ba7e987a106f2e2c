"""Which attention runs, and what is said when it cannot."""

import pytest
import torch
from transformers import BloomConfig

from llava_ds.config import ModelConfig
from llava_ds.errors import BackendUnavailableError, ConfigError
from llava_ds.models import build
from llava_ds.models.build import build_llm, resolve_attention

CUDA = torch.device("cuda")


@pytest.fixture
def flash_attn(monkeypatch):
    """As if the package were installed."""
    monkeypatch.setattr(build, "is_flash_attn_2_available", lambda: True)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "sdpa"), (torch.bfloat16, "flash_attention_2"), (torch.float16, "flash_attention_2")],
)
def test_auto_takes_flash_attention_only_where_it_can_compute(flash_attn, dtype, name):
    assert resolve_attention("auto", CUDA, dtype).name == name


def test_flash_attention_by_name_is_refused_in_fp32(flash_attn):
    with pytest.raises(BackendUnavailableError, match=r"the model is in float32.\n.*train.precision"):
        resolve_attention("flash_attention_2", CUDA, torch.float32)
    assert resolve_attention("flash_attention_2", CUDA, torch.bfloat16).name == "flash_attention_2"


def test_an_architecture_without_sdpa_names_the_way_out(tmp_path):
    BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    config = ModelConfig(vision_tower="x", llm=str(tmp_path), llm_init="random", projector="linear")
    with pytest.raises(ConfigError, match="model.attn_implementation=eager"):
        build_llm(config, "sdpa", torch.float32, seed=0)
    assert build_llm(config, "eager", torch.float32, seed=0).config.hidden_size == 32
