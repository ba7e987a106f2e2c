"""What tensors take while something runs."""

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that tensors on the CPU took at once during the call, those inside of operators too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it tells stderr that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    changes = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(one.nbytes() for one in sorted(changes, key=lambda one: one.start_ns())))
