"""Which attention and which splice run, and what is said when they cannot."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig

from llava_ds.config import ModelConfig, load_recipe
from llava_ds.distributed import Ranks
from llava_ds.engine.run_record import start_run
from llava_ds.errors import BackendUnavailableError, ConfigError
from llava_ds.models import build
from llava_ds.models.build import Backend, build_llm, resolve_attention, resolve_splice
from llava_ds.ops import splice_cuda
from tests.helpers.tiny import write_recipe, write_world

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


@pytest.fixture
def kernel(monkeypatch):
    """Answers for the fused kernel; counts how often it is asked, which compiles it on a GPU."""
    answer = SimpleNamespace(why_not=None, capability=(9, 0), asked=[])

    def why_not_fused(device, dtype):
        answer.asked.append((device, dtype))
        return answer.why_not

    monkeypatch.setattr(splice_cuda, "why_not_fused", why_not_fused)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: answer.capability)
    return answer


@pytest.mark.parametrize(
    ("projector", "dtype", "capability", "name", "reason"),
    [
        ("linear", torch.bfloat16, (9, 0), "fused", "passed its check"),
        ("linear", torch.float16, (8, 0), "fused", "passed its check"),
        ("linear", torch.float32, (9, 0), "library", "in fp32"),
        ("mlp2x_gelu", torch.bfloat16, (8, 9), "fused", "passed its check"),
        ("mlp2x_gelu", torch.bfloat16, (9, 0), "library", "second layer of mlp2x_gelu"),
        ("mlp2x_gelu", torch.float16, (10, 0), "library", "second layer of mlp2x_gelu"),
        ("mlp2x_gelu", torch.float32, (8, 0), "library", "in fp32"),
    ],
)
def test_auto_takes_the_faster_splice_and_compiles_no_other(kernel, projector, dtype, capability, name, reason):
    kernel.capability = capability
    backend = resolve_splice("auto", projector, CUDA, dtype)
    assert backend.name == name and reason in backend.reason
    assert kernel.asked == ([(CUDA, dtype)] if name == "fused" else [])


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_splice_by_name_runs_or_says_why_not(kernel, projector, dtype):
    assert resolve_splice("fused", projector, CUDA, dtype) == Backend("fused", "asked for by name")
    kernel.why_not = "NVRTC is not installed"
    with pytest.raises(BackendUnavailableError, match=r"splice=fused cannot run: NVRTC is not installed.\n.*auto"):
        resolve_splice("fused", projector, CUDA, dtype)
    assert kernel.asked == [(CUDA, dtype)] * 2


def test_auto_says_why_the_fused_splice_is_not_usable(kernel):
    kernel.why_not = "its sums are wrong on this device"
    backend = resolve_splice("auto", "linear", CUDA, torch.bfloat16)
    assert backend == Backend("library", "the fused kernel is not usable: its sums are wrong on this device")


def test_the_library_by_name_asks_nothing(kernel):
    assert resolve_splice("library", "linear", CUDA, torch.bfloat16) == Backend("library", "asked for by name")
    assert kernel.asked == []


def test_a_cpu_has_the_library_only():
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        backend = resolve_splice("auto", "mlp2x_gelu", cpu, dtype)
        assert backend.name == "library" and "CUDA" in backend.reason
        with pytest.raises(BackendUnavailableError, match="model.splice=fused cannot run: .*CUDA"):
            resolve_splice("fused", "linear", cpu, dtype)


def test_chosen_backends_are_printed_and_stand_in_the_run_record(tmp_path, capsys):
    backends = {"attention": Backend("sdpa", "a"), "packing": Backend("padded", "b"), "splice": Backend("library", "c")}
    config = load_recipe(str(write_recipe(write_world(tmp_path))))
    source = SimpleNamespace(sources=[_Source() for _ in config.data.sources()])
    plan = SimpleNamespace(num_samples=1, num_steps=1, source=source, lengths=SimpleNamespace(num_cut=lambda: 0))
    model = SimpleNamespace(vision_tower=SimpleNamespace(spec=SimpleNamespace(as_dict=dict)))
    data = SimpleNamespace(plan=plan, skipped={}, eval=None)
    lock = start_run(tmp_path / "run", config, {}, model, backends, {}, data, Ranks(0, 0, 1))
    lock.release()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {name: record[name] for name in backends} == {name: vars(backend) for name, backend in backends.items()}
    assert "attention: sdpa (a); packing: padded (b); splice: library (c)" in capsys.readouterr().out


class _Source:
    fingerprint = "0"

    def __len__(self) -> int:
        return 1
