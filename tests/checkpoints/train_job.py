"""Several runs of train.py, one after the other, in one start of the ranks.

    deepspeed tests/checkpoints/train_job.py PLAN

PLAN is a JSON list of {"recipe", "zero", "run_dir"}, and where wanted "zero_options" (added to zero_optimization of the
DeepSpeed JSON), "resume" (as the option), "largest_file" (bytes
that rank 1 may write into one file: its disk is full then). ``<plan>.<rank>.json`` gets a list of {"outcome": "fine" or
the error, "output": what was printed}.
"""

import io
import json
import os
import resource
import sys
import traceback
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from llava_ds.config import load_recipe
from llava_ds.distributed import apply_launcher_environment, flush_and_exit
from llava_ds.errors import CheckpointError, ConfigError, DataError
from llava_ds.train import run

ROOT = Path(__file__).parents[2]


@contextmanager
def _largest_file(size: int | None):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _ds_json(case: dict, plan: Path) -> Path:
    shipped = ROOT / "ds_configs" / f"{case['zero']}.json"
    if not case.get("zero_options"):
        return shipped
    raw = json.loads(shipped.read_text())
    raw["zero_optimization"] |= case["zero_options"]
    file = plan.with_name(f"{Path(case['run_dir']).name}-{os.environ['RANK']}.json")
    file.write_text(json.dumps(raw))
    return file


def main(plan: str) -> None:
    ranks = apply_launcher_environment(os.environ)
    outcomes = []
    for case in json.loads(Path(plan).read_text()):
        ds_json = _ds_json(case, Path(plan))
        output, outcome, crashed = io.StringIO(), "fine", False
        limit = case.get("largest_file") if ranks.rank == 1 else None
        try:
            with redirect_stdout(output), _largest_file(limit):
                run(load_recipe(case["recipe"]), ds_json, Path(case["run_dir"]), case.get("resume"), ranks)
        except (CheckpointError, ConfigError, DataError) as error:
            outcome = f"{type(error).__name__}: {error}"
        except Exception:
            outcome, crashed = traceback.format_exc(), True
        outcomes.append({"outcome": outcome, "output": output.getvalue()})
        if crashed:
            break  # the ranks are no longer at the same place
    Path(f"{plan}.{ranks.rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    # The launcher adds --local_rank before the arguments.
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")])
    flush_and_exit(0)
