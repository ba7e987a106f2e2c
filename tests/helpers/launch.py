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
from tests.helpers.fork_server import Script, run_scripts

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "llava_ds" / "train.py"


def clean_environ() -> dict[str, str]:
    """The environment without a surrounding launcher's variables."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM_")}
    return environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"}


def deepspeed_command(num_ranks: int, script: object, *arguments: object) -> list[str]:
    """The launcher's command line."""
    launcher = ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
    return [*launcher, str(script), *map(str, arguments)]


def train_script(recipe: Path, zero: str, run_dir: Path, *options: str) -> list[str]:
    """train.py and its arguments, to be started in some way."""
    arguments = ["--deepspeed", ROOT / "ds_configs" / f"{zero}.json", "--recipe", recipe, "--run-dir", run_dir]
    return [str(TRAIN), *map(str, arguments), *options]


def launch(recipe: Path, zero: str, num_ranks: int, run_dir: Path, *options: str) -> subprocess.CompletedProcess:
    """One run of train.py by the deepspeed launcher."""
    command = deepspeed_command(num_ranks, *train_script(recipe, zero, run_dir, *options))
    return subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=240)


def fork_alone(script: Sequence[str]) -> subprocess.CompletedProcess:
    """A script as one process without a launcher, started by the fork server."""
    return run_scripts([Script(script, clean_environ())])[0]


def fork_ranks(num_ranks: int, script: Sequence[str]) -> list[subprocess.CompletedProcess]:
    """A script as the ranks that a launcher starts, started by the fork server; what became of each."""
    environ = clean_environ() | {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    environ["MASTER_PORT"] = str(free_port())
    return run_scripts(
        [Script(script, environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(num_ranks)]
    )


def assert_all_fine(ranks: Sequence[subprocess.CompletedProcess]) -> None:
    """Every rank ended with 0."""
    wrong = [rank.stderr[-3000:] for rank in ranks if rank.returncode != 0]
    assert ranks and not wrong, "\n".join(wrong)


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
