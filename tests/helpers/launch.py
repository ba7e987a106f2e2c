"""Real launches of training for tests, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.fragments import open_optimizer, open_weights
from llava_ds.distributed import free_port

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "llava_ds" / "train.py"


def clean_environ() -> dict[str, str]:
    """The environment without a surrounding launcher's variables."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM_")}
    return environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"}


def deepspeed_command(num_ranks: int, script: Path, *arguments: object) -> list[str]:
    """The launcher's command line."""
    launcher = ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
    return [*launcher, str(script), *map(str, arguments)]


def launch(recipe: Path, zero: str, num_ranks: int, run_dir: Path, *options: str) -> subprocess.CompletedProcess:
    """One run of train.py by the deepspeed launcher."""
    arguments = ["--deepspeed", ROOT / "ds_configs" / f"{zero}.json", "--recipe", recipe, "--run-dir", run_dir]
    command = deepspeed_command(num_ranks, TRAIN, *arguments, *options)
    return subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=240)


def run_cases(folder: Path, num_ranks: int, cases: Sequence[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Runs all ``cases`` (see tests/checkpoints/train_job.py) in one launch; of each rank, what became of each."""
    plan = folder / f"plan-{num_ranks}-{len(list(folder.glob('plan-*[0-9].json')))}.json"
    plan.write_text(json.dumps(cases))
    command = deepspeed_command(num_ranks, ROOT / "tests" / "checkpoints" / "train_job.py", plan)
    environ = clean_environ() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(Path(f"{plan}.{rank}.json").read_text()) for rank in range(num_ranks)]


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    clock = {"samples_per_s", "tokens_per_s", "data_wait_frac", "step_s", "elapsed_s", "eval_s"}
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def read_losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read_lines(run_dir)]


def read_tensors(step: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of a checkpoint, whole."""
    return {name: tensor.whole() for name, tensor in (open_weights(step) | open_optimizer(step)).items()}
