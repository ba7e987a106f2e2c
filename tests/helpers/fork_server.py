"""Python scripts in processes of their own, without the seconds that their imports take.

A server, a new Python process with the environment of a command line, imports what is large and does nothing else. For
each script it forks: the child runs the script as ``python SCRIPT ARGUMENTS`` does, with its own environment, standard
streams and exit code, and ends as a process ends. Nothing of one script reaches another.

What this cannot see: that a fresh process imports what it needs, a variable that is read while a library is imported,
and ranks that hash text differently (they are forks of one process). So keep a real start of every script.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
# What a run, a merge and a chat import: the modules of this project, and what libraries load when it is first used.
MODULES = (
    "llava_ds.train", "llava_ds.data.build", "llava_ds.engine.inputs", "llava_ds.engine.loop", "llava_ds.engine.optim",
    "llava_ds.engine.run_record", "llava_ds.engine.setup", "llava_ds.inference.session",
    "matplotlib.backends.backend_agg", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3", "functorch.compile", "torch._inductor.compile_fx",
    "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama",
    "transformers.models.llava.processing_llava", "transformers.tokenization_mistral_common",
)
_STREAMS = ("stdin", "stdout", "stderr")


@dataclass(frozen=True)
class Script:
    """One process: a script and its arguments, with what is read from stdin."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    stdin: str = ""


def run_scripts(scripts: Sequence[Script], timeout_s: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Runs all at the same time; what took longer than ``timeout_s`` was killed, and has a negative returncode."""
    with TemporaryDirectory() as folder:
        for number, script in enumerate(scripts):
            Path(folder, f"{number}.stdin").write_text(script.stdin)
        jobs = [{"argv": list(script.argv), "environ": dict(script.environ)} for script in scripts]
        codes = _ask({"jobs": jobs, "folder": folder, "cwd": os.getcwd(), "timeout_s": timeout_s})
        return [
            subprocess.CompletedProcess(
                list(script.argv), code, *(Path(folder, f"{number}.{name}").read_text() for name in _STREAMS[1:])
            )
            for number, (script, code) in enumerate(zip(scripts, codes, strict=True))
        ]


@cache
def _server() -> subprocess.Popen[str]:
    """Lives as long as the tests: it ends when its stdin does."""
    # Whether there is a GPU is asked without CUDA, which does not survive a fork.
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, "-m", "tests.helpers.fork_server"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ, cwd=ROOT)
    atexit.register(server.communicate)
    return server


def _ask(request: dict[str, Any]) -> list[int]:
    server = _server()
    assert server.stdin and server.stdout
    print(json.dumps(request), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, f"the fork server ended with {server.wait()}"
    return json.loads(answer)


def _serve() -> dict[str, Any]:
    """Answers requests until stdin ends. In a child it returns, with the job that the child is to do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where imports print
    for module in MODULES:
        import_module(module)
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1:
        sys.exit(f"an import started {num_threads - 1} thread(s), which a fork would lose")
    while line := sys.stdin.readline():
        request = json.loads(line)
        pids = []
        for number, job in enumerate(request["jobs"]):
            if not (pid := os.fork()):
                answers.close()
                return job | {"cwd": request["cwd"], "streams": f"{request['folder']}/{number}"}
            pids.append(pid)
        print(json.dumps(_wait(pids, request["timeout_s"])), file=answers, flush=True)
    sys.exit()


def _wait(pids: list[int], timeout_s: float) -> list[int]:
    """The exit codes, as subprocess counts them."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout_s
    try:
        while len(codes) < len(pids):
            for pid in set(pids) - codes.keys():
                if time.monotonic() > end:
                    os.killpg(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        for pid in set(pids) - codes.keys():  # the tests were stopped
            os.killpg(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def _become(job: dict[str, Any]) -> None:
    """This process as ``python SCRIPT ARGUMENTS`` finds it."""
    os.setsid()
    for number, name in enumerate(_STREAMS):
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT
        file = os.open(f"{job['streams']}.{name}", flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environ"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = str(Path(job["argv"][0]).parent)


if __name__ == "__main__":
    _become(_serve())
    runpy.run_path(sys.argv[0], run_name="__main__")
