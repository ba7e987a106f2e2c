"""Under ZeRO-3 on two ranks the splice trains as without DeepSpeed, and its weights are whole around it only."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava_ds.distributed import free_port
from llava_ds.models.projector import split_projector
from tests.distributed.splice_job import CASES, NUM_RANKS, NUM_STEPS, RATE, SHARE, Case, build, make_batch, write_llms
from tests.helpers.launch import ROOT, clean_environ

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """What one launch of every case left."""
    folder = tmp_path_factory.mktemp("splice")
    write_llms(folder)
    command = ["deepspeed", "--num_accelerators", str(NUM_RANKS), "--master_port", str(free_port())]
    command += [str(Path(__file__).with_name("splice_job.py")), str(folder)]
    environ = clean_environ() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def _train_alone(case: Case, root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after the steps of one process, which takes the ranks' batches one after the other."""
    model = build(case, root)
    for module in model.modules():
        if module is not split_projector(model.projector)[1]:  # its weight is read, and it is never called
            module.register_forward_pre_hook(_as_one_gradient)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(NUM_STEPS):
        for rank in range(NUM_RANKS):
            (model(make_batch(case, rank, step)) * SHARE).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, dict(model.named_parameters())


def _as_one_gradient(_: nn.Module, inputs: tuple) -> tuple:
    """Has the gradients of an input's uses within a module add up before they meet those of its uses elsewhere.

    DeepSpeed's hooks do that; without it, sums of three gradients round differently in the last place.
    """
    return tuple(x.view_as(x) if isinstance(x, torch.Tensor) else x for x in inputs)


@pytest.mark.parametrize("name", CASES)
def test_parameters_equal_those_of_one_process(root, name):
    case, found = CASES[name], load_file(root / f"{name}.safetensors")
    before, expected = _train_alone(case, root)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), (key, float((found[key] - value).abs().max()))
        still = not value.requires_grad or (key.startswith("projector.") and not any(case.images))
        assert torch.equal(value, before[key]) == still, key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero])
def test_weights_are_whole_in_the_splice_and_nowhere_else(root, name):
    case = CASES[name]
    is_called = case.low_rank_embedding or case.llm == "gemma"
    expected = [
        ["in the splice", ["weight", "bias"] if is_called else ["weight", "bias", "table"]],
        ["after the splice", []],
        ["in the LLM", []],
        ["after the step", []],
    ]
    for rank in range(NUM_RANKS):
        assert json.loads((root / f"{rank}.json").read_text())[name] == expected * NUM_STEPS


def test_a_splice_that_names_no_weights_finds_none(root):
    for rank in range(NUM_RANKS):
        found = json.loads((root / f"{rank}.json").read_text())["unregistered"]
        assert found.startswith("ValueError: expected patch_features"), found
