"""Ranks that differ, on purpose: writes what each rank was told to ``<out>/<rank>.json``.

    deepspeed tests/distributed/agree_job.py OUT
"""

import json
import os
import sys
from pathlib import Path

import torch

from llava_ds.distributed import (
    Ranks,
    apply_launcher_environment,
    check_agreement,
    flush_and_exit,
    gather_objects,
    run_on_main_first,
)
from llava_ds.engine import deepspeed_backend as backend
from llava_ds.engine.setup import agree_on_backend
from llava_ds.errors import DataError
from llava_ds.models.build import Backend


def _told(attempt) -> str:
    try:
        return f"fine: {attempt()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _fail_on(rank: int, ranks: Ranks) -> str:
    if ranks.rank == rank:
        raise DataError(f"no data on rank {rank}")
    return "made"


def main(out: str) -> None:
    ranks = apply_launcher_environment(os.environ)
    backend.init_distributed(torch.device("cpu"))
    told = {
        "gathered": gather_objects(ranks, {"rank": ranks.rank}),
        "same": _told(lambda: check_agreement(ranks, "the plans", "abc")),
        "different": _told(lambda: check_agreement(ranks, "the plans", f"abc{ranks.rank}")),
        "main fails": _told(lambda: run_on_main_first(ranks, lambda: _fail_on(0, ranks))),
        "other fails": _told(lambda: run_on_main_first(ranks, lambda: _fail_on(1, ranks))),
        "backend": vars(agree_on_backend(Backend(*(("fused", "fine"), ("library", "bad GPU"))[ranks.rank]), ranks)),
        "none fails": _told(lambda: run_on_main_first(ranks, lambda: _fail_on(2, ranks))),
    }
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    # The launcher adds --local_rank before the arguments.
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")])
    flush_and_exit(0)
