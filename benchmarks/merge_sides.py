"""One side of merge_ckpt.py in a process of its own: merge_sides.py ours|pieces|deepspeed FROM TO.

It says when its imports are done, waits for a line, does the work and says how long that took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[Path, Path], dict[str, float]]
"""From a checkpoint to a folder of safetensors; returns further figures."""


def ours() -> Work:
    """What tools/merge_ckpt does."""
    from llava_ds.checkpoint.merge import merge

    def work(source: Path, out: Path) -> dict[str, float]:
        merge(source, out)
        return {}

    return work


def pieces() -> Work:
    """The parts of ours that take time, one after the other and each by itself."""
    from llava_ds.checkpoint.fragments import open_weights
    from llava_ds.checkpoint.layout import find_damage, resolve_step
    from llava_ds.checkpoint.writer import write_sharded

    def work(source: Path, out: Path) -> dict[str, float]:
        step = resolve_step(source)
        out.mkdir()
        seconds = {}
        begin = time.perf_counter()
        if find_damage(step):
            raise SystemExit(f"{step} is damaged")
        seconds["check_input_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        write_sharded(out, list(open_weights(step).items()), 5 * 10**9)
        seconds["copy_s"] = time.perf_counter() - begin
        return seconds

    return work


def deepspeed() -> Work:
    """DeepSpeed's conversion to safetensors, with its defaults."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    def work(source: Path, out: Path) -> dict[str, float]:
        convert_zero_checkpoint_to_fp32_state_dict(str(source), str(out), safe_serialization=True)
        return {}

    return work


def memory_bytes(field: str, pid: int | str = "self") -> int:
    """A line of /proc/PID/status, e.g. RssAnon or VmHWM; 0 once the process is over."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def main(side: str, source: str, out: str) -> None:
    """Talks JSON, a line each, to the stdout that it was started with; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = {"ours": ours, "pieces": pieces, "deepspeed": deepspeed}[side]()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = memory_bytes("VmRSS")
    print(json.dumps({"imported_anon_bytes": memory_bytes("RssAnon")}), file=answers, flush=True)
    sys.stdin.readline()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    figures = work(Path(source), Path(out))
    wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    begin = time.perf_counter()
    for file in Path(out).rglob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    synced = wall + time.perf_counter() - begin
    grown = memory_bytes("VmHWM") - before
    found = {"wall_s": wall, "cpu_s": cpu, "on_disk_s": synced, "rss_grown_bytes": grown}
    print(json.dumps(found | figures), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
