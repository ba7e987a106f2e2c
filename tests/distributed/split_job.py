"""One rank of a ZeRO-3 model build: writes what it holds of the LLM to ``<out>/<rank>.json``.

    deepspeed tests/distributed/split_job.py RECIPE OUT
"""

import json
import os
import sys
from pathlib import Path

import torch

from llava_ds.config import load_recipe
from llava_ds.distributed import apply_launcher_environment, flush_and_exit
from llava_ds.engine import deepspeed_backend as backend
from llava_ds.models.build import build_model


def main(recipe: str, out: str) -> None:
    ranks = apply_launcher_environment(os.environ)
    config = load_recipe(recipe)
    backend.init_distributed(torch.device("cpu"))
    ds_config = {"train_batch_size": ranks.world_size, "zero_optimization": {"stage": 3}}
    partitioned = backend.hold_partitioned_construction(ds_config)
    model = build_model(config.model, "sdpa", torch.float32, config.seed)
    held = {
        name: {
            "whole": list(getattr(parameter, "ds_shape", [])),
            "num_held": parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel(),
            "num_outside": parameter.numel(),  # besides the partition
        }
        for name, parameter in model.llm.named_parameters()
    }
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(held))
    del partitioned


if __name__ == "__main__":
    # The launcher adds --local_rank before the arguments.
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")])
    flush_and_exit(0)
