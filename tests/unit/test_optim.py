"""Which parameters decay, at which rate they learn, and the schedule's exact values."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_ds.config import TrainConfig
from llava_ds.engine.optim import build_optimizer, build_scheduler
from llava_ds.errors import ConfigError


def _train(**changes) -> TrainConfig:
    raw = {"trainable": ["projector", "llm"], "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3}
    return TrainConfig(**raw | {"projector_learning_rate": 5e-4, "weight_decay": 0.1} | changes)


class _Block(nn.Module):
    """Norms under the names that models give them; an embedding that only sounds like one."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(4)
        self.layernorm = nn.RMSNorm(4)
        self.norm1 = nn.GroupNorm(2, 4)
        self.enormous = nn.Linear(4, 4)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.llm = nn.ModuleDict({
            "block": _Block(),
            "llama": LlamaForCausalLM(
                LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=2, attention_bias=True)
            ),
        })


def _settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Name -> (rate, decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_biases_and_norms_never_decay_and_the_projector_has_its_own_rate():
    model = _Model()
    settings = _settings(model, build_optimizer(model, _train()))
    assert set(settings) == {name for name, _ in model.named_parameters()}
    undecayed = {name for name, (_, decay) in settings.items() if decay == 0}
    layer = "llm.llama.model.layers.0"
    assert undecayed == {
        "projector.0.bias", "projector.1.weight", "projector.1.bias",
        "llm.block.ln_1.weight", "llm.block.ln_1.bias", "llm.block.layernorm.weight",
        "llm.block.norm1.weight", "llm.block.norm1.bias", "llm.block.enormous.bias",
        *(f"{layer}.self_attn.{name}_proj.bias" for name in "qkvo"),
        f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "llm.llama.model.norm.weight",
    }
    assert {decay for name, (_, decay) in settings.items() if name not in undecayed} == {0.1}
    assert {rate for name, (rate, _) in settings.items() if name.startswith("projector.")} == {5e-4}
    assert {rate for name, (rate, _) in settings.items() if not name.startswith("projector.")} == {1e-3}


def test_without_a_rate_of_its_own_the_projector_learns_like_the_rest():
    model = _Model()
    settings = _settings(model, build_optimizer(model, _train(projector_learning_rate=None)))
    assert {rate for rate, _ in settings.values()} == {1e-3}


def test_frozen_parameters_are_left_out_and_none_at_all_is_an_error():
    model = _Model()
    model.llm.requires_grad_(False)
    assert all(name.startswith("projector.") for name in _settings(model, build_optimizer(model, _train())))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(model, _train())


def test_betas_and_eps_are_the_recipes():
    defaults = build_optimizer(_Model(), _train(adam_betas=(0.8, 0.95), adam_eps=1e-6)).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.8, 0.95), 1e-6)


def _rates(train: TrainConfig, num_steps: int) -> list[float]:
    """The rate of every step, and of the one that would follow."""
    optimizer = build_optimizer(nn.Linear(2, 2), train)
    scheduler = build_scheduler(optimizer, train, num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_at_the_start_the_end_of_the_warmup_half_way_and_the_end():
    rates = _rates(_train(warmup_ratio=0.1), 100)
    assert rates[0] == 0
    assert rates[1] == pytest.approx(1e-4, rel=1e-12)
    assert rates[9] == pytest.approx(9e-4, rel=1e-12)
    assert rates[10] == 1e-3  # warm-up over
    assert rates[55] == pytest.approx(5e-4, rel=1e-12)  # half of the 90 steps after it
    assert rates[99] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 89 / 90)), rel=1e-12)
    assert rates[100] == 0
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))


def test_the_warmup_rounds_up():
    rates = _rates(_train(warmup_ratio=0.03), 40)  # 1.2 steps -> 2
    assert rates[:3] == [0, pytest.approx(0.5e-3, rel=1e-12), 1e-3]


def test_constant_stays():
    assert _rates(_train(warmup_ratio=0.1, lr_schedule="constant"), 20)[2:] == [1e-3] * 19


def test_without_warmup_the_first_step_has_the_whole_rate():
    assert _rates(_train(warmup_ratio=0), 20)[0] == 1e-3
