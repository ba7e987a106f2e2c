"""Trains small models under ZeRO-3: their parameters go to ``<root>/<case>.safetensors``, what each rank saw of the
weights to ``<root>/<rank>.json``.

    deepspeed tests/distributed/splice_job.py ROOT
"""

import json
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from llava_ds.config import ModelConfig
from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.distributed import Ranks, apply_launcher_environment, flush_and_exit
from llava_ds.engine import deepspeed_backend as backend
from llava_ds.models.build import build_llm, checkpoint_activations
from llava_ds.models.freezing import apply_freezing
from llava_ds.models.llava import Llava
from llava_ds.models.projector import build_projector
from llava_ds.models.splice import Splice
from llava_ds.schema import Batch, EncodedSample

NUM_RANKS = 2
NUM_STEPS = 3  # DeepSpeed records the order of the modules in the second step and goes by it in the third
NUM_PATCHES, VISION_WIDTH, LLM_WIDTH, VOCABULARY, RANK_OF_ADDITION = 5, 12, 32, 61, 3
# Powers of two, so that scaling a gradient rounds nothing, with or without a fused multiply-add.
RATE, SHARE = 2.0**-2, 2.0**-5
# Nothing is kept for a later use, nothing is fetched before its use: what is whole is in use.
# DeepSpeed's own linear function sums in another order; it stays for good where it once was put in.
STRICT = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
          "memory_efficient_linear": False}
GATHERING_READ = ZeROOrderedDict.__getitem__
OFFLOAD = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}


Seen = tuple[str, list[str]]
"""A place in the step, and the weights that are whole there."""


@dataclass(frozen=True)
class Case:
    """A model, what of it trains, and how DeepSpeed is set."""

    llm: str = "llama"
    projector: str = "linear"
    trainable: tuple[str, ...] = ("projector", "llm")
    images: tuple[int, int] = (2, 3)
    """Of every micro-batch, by rank."""
    partitioned: bool = True
    """The LLM is built partitioned; otherwise DeepSpeed divides it."""
    checkpointing: bool = False
    low_rank_embedding: bool = False
    gathers_on_read: bool = False
    """DeepSpeed gathers what a module reads of another's, and from then on around the module that is running.
    The splice must not need that, and nothing outside it may cause it."""
    zero: dict = field(default_factory=lambda: STRICT)


CASES = {
    "everything trains": Case(),
    "built whole": Case(partitioned=False, gathers_on_read=True),
    "activation checkpointing": Case(checkpointing=True),
    "frozen LLM": Case(trainable=("projector",), checkpointing=True),
    "frozen projector": Case(trainable=("llm",)),
    "two layers": Case(projector="mlp2x_gelu"),
    "offload": Case(zero=STRICT | OFFLOAD),
    "rank 1 has no image": Case(images=(2, 0)),
    "rank 1 has no image, frozen LLM": Case(images=(2, 0), trainable=("projector",)),
    "no image at all": Case(images=(0, 0)),
    "tied embeddings": Case(llm="tied"),
    "padding row": Case(llm="padded"),
    "scaled embedding": Case(llm="gemma"),
    "low-rank addition": Case(low_rank_embedding=True),
    "DeepSpeed's defaults": Case(zero={}, gathers_on_read=True),
}


class LowRankEmbedding(nn.Module):
    """As LoRA does it: the rows of a frozen table plus those of a product of two small matrices."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(4)
        self.down = nn.Parameter(torch.randn(VOCABULARY, RANK_OF_ADDITION, generator=generator))
        self.up = nn.Parameter(torch.randn(RANK_OF_ADDITION, LLM_WIDTH, generator=generator))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.base(ids) + F.embedding(ids, self.down) @ self.up


def write_llms(root: Path) -> None:
    """A folder for each kind of LLM that the cases name."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": LLM_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=None)).save_pretrained(root / "llama")
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=None, tie_word_embeddings=True)).save_pretrained(root / "tied")
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=7)).save_pretrained(root / "padded")
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8)).save_pretrained(root / "gemma")


def build(case: Case, root: Path) -> Llava:
    """The model of a case, its LLM partitioned where a HfDeepSpeedConfig is alive. It takes patch features only."""
    config = ModelConfig(vision_tower="none", llm=str(root / case.llm), projector=case.projector)
    llm = build_llm(config, "sdpa", torch.float32, seed=0)
    if case.checkpointing:
        checkpoint_activations(llm)
    model = Llava(nn.Identity(), build_projector(case.projector, VISION_WIDTH, LLM_WIDTH, seed=1), llm)
    apply_freezing(model, case.trainable)
    if case.low_rank_embedding:
        llm.set_input_embeddings(LowRankEmbedding(llm.get_input_embeddings()))
    return model.train()


def make_batch(case: Case, rank: int, step: int) -> Batch:
    """A padded micro-batch of a text and a sample for each image."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    examples = []
    for number in range(1 + case.images[rank]):
        has_image = number > 0
        before, after = torch.randint(2, 9, (2,), generator=generator).tolist()
        text = torch.randint(VOCABULARY, (before + after,), generator=generator).tolist()
        patches = [IMAGE_TOKEN_INDEX] * (NUM_PATCHES * has_image)
        ids = (*text[:before], *patches, 7, *text[before:])  # 7 is one LLM's padding, here as a word
        labels = tuple(IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else i for i in ids)
        images = [torch.randn(NUM_PATCHES, VISION_WIDTH, generator=generator)] if has_image else []
        examples.append(Example(EncodedSample(str(number), ("x",) * has_image, ids, labels), images))
    return Collator("padded", torch.ones(NUM_PATCHES, VISION_WIDTH), features=True)(examples)


def train(case: Case, root: Path, ranks: Ranks) -> tuple[dict[str, torch.Tensor], list[Seen]]:
    """The parameters after the steps, and which of the splice's weights were whole at three places of each step and
    after it."""
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks.world_size,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 where nothing is said
        "zero_optimization": {"stage": 3, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    ZeROOrderedDict.__getitem__ = GATHERING_READ if case.gathers_on_read else OrderedDict.__getitem__
    partitioned = backend.hold_partitioned_construction(ds_config) if case.partitioned else None
    model = build(case, root)
    del partitioned  # what is built from here on is the next case's
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = _weights_of_splice(model)  # before DeepSpeed, which may gather a weight that it sees being read
    engine = backend.initialize_engine(model, torch.optim.SGD(trained, lr=RATE), None, ds_config)
    seen = _watch(model, weights)
    for step in range(NUM_STEPS):
        loss = engine(make_batch(case, ranks.rank, step))
        engine.backward(loss * (SHARE * ranks.world_size))
        engine.step()
        seen.append(("after the step", _whole(weights)))
    parameters = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            parameters[name] = parameter.detach().clone()
    engine.destroy()
    return parameters, seen


def _weights_of_splice(model: Llava) -> dict[str, nn.Parameter]:
    embedding = model.llm.get_input_embeddings()
    linear = model.projector[-1] if isinstance(model.projector, nn.Sequential) else model.projector
    return {"weight": linear.weight, "bias": linear.bias, "table": getattr(embedding, "base", embedding).weight}


def _whole(weights: dict[str, nn.Parameter]) -> list[str]:
    return [name for name, weight in weights.items() if weight.ds_status.name != "NOT_AVAILABLE"]


def _watch(model: Llava, weights: dict[str, nn.Parameter]) -> list[Seen]:
    """Hooks that come after DeepSpeed's: they see what a module's computation sees, and what is left after it."""
    seen: list[Seen] = []
    model.splice.register_forward_pre_hook(lambda *_: seen.append(("in the splice", _whole(weights))))
    model.splice.register_forward_hook(lambda *_: seen.append(("after the splice", _whole(weights))))
    model.llm.model.norm.register_forward_hook(lambda *_: seen.append(("in the LLM", _whole(weights))))
    return seen


def train_unregistered(root: Path, ranks: Ranks) -> str:
    """What happens when the splice does not say which weights it reads."""
    Splice.external_parameters = lambda self: []
    try:
        train(CASES["everything trains"], root, ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def main(folder: str) -> None:
    root = Path(folder)
    ranks = apply_launcher_environment(os.environ)
    backend.init_distributed(torch.device("cpu"), timeout_s=30)
    told = {}
    for name, case in CASES.items():
        parameters, told[name] = train(case, root, ranks)
        if ranks.is_main:
            save_file(parameters, root / f"{name}.safetensors")
    told["unregistered"] = train_unregistered(root, ranks)  # the last, as it leaves DeepSpeed in the middle of a step
    (root / f"{ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    # The launcher adds --local_rank before the arguments.
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")])
    flush_and_exit(0)
