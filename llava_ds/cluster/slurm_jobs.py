"""What a batch script asks of Slurm about its own job, with the standard library alone.

    python3 -m llava_ds.cluster.slurm_jobs JOB [--exclude NODE,NODE] SCRIPT [ARGUMENT ...]    submits it anew
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from llava_ds.engine.run_lock import SUCCEEDS_VARIABLE
from llava_ds.errors import ConfigError
from llava_ds.starts import START_VARIABLE

_TIMEOUT_S = 60
_PAIR = re.compile(r"(\S+?)=(.*?)(?= \S+?=|$)")
# Of the batch script's environment; what Slurm shows of a job that is about to end may be other numbers.
_SIZES = {
    "SLURM_JOB_NUM_NODES": "--nodes", "SLURM_NTASKS_PER_NODE": "--ntasks-per-node",
    "SLURM_CPUS_PER_TASK": "--cpus-per-task",
}
# Of `scontrol show job` and of sbatch. What a job did not ask for is "(null)" or "N/A" there.
_OPTIONS = {
    "JobName": "--job-name", "Account": "--account", "Partition": "--partition", "QOS": "--qos",
    "TimeLimit": "--time",
    "TresPerNode": "--gres", "MinMemoryNode": "--mem", "MinMemoryCPU": "--mem-per-cpu", "Features": "--constraint",
    "Reservation": "--reservation", "StdOut": "--output", "TresPerJob": "--gpus", "TresPerTask": "--gpus-per-task",
    "Licenses": "--licenses",
}


def show_job(job: str) -> dict[str, str]:
    """What ``scontrol show job`` says of a job. Raises ConfigError when Slurm does not know it."""
    line = _run(["scontrol", "show", "job", "-o", job]).strip().splitlines()[0]
    return {key: value.strip() for key, value in _PAIR.findall(line)}


def resubmit(job: str, script: str, arguments: Sequence[str], exclude: Sequence[str] = ()) -> str:
    """Submits the job anew with what it had asked for, without the nodes ``exclude``; returns the new job's id.

    Jobs that wait for the old one wait for the new one then. Raises ConfigError when Slurm refuses it.
    """
    shown = show_job(job)
    excluded = [name for name in (shown.get("ExcNodeList", "(null)"), *exclude) if name not in ("", "(null)")]
    command = ["sbatch", "--parsable", "--export=ALL", *options_of(shown, os.environ)]
    command += [f"--exclude={','.join(excluded)}"] if excluded else []
    new = _run([*command, script, *arguments], clean_environ(os.environ, job)).strip().split(";")[0]
    for dependent, dependency in _dependents(job):
        moved = re.sub(rf":{job}\b", f":{new}", dependency)
        try:
            _run(["scontrol", "update", f"JobId={dependent}", f"Dependency={moved}"])
        except ConfigError as error:
            print(f"job {dependent} still waits for job {job}, not for {new}: {error}", file=sys.stderr)
    return new


def options_of(shown: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """The options of sbatch that ask for what a job has, by ``scontrol show job`` and by its script's environment."""
    options = [f"{option}={environ[name]}" for name, option in _SIZES.items() if environ.get(name)]
    if "SLURM_NTASKS_PER_NODE" not in environ and environ.get("SLURM_NTASKS"):
        options.append(f"--ntasks={environ['SLURM_NTASKS']}")
    if shown.get("OverSubscribe") == "NO":
        options.append("--exclusive")
    if shown.get("Requeue") == "0":
        options.append("--no-requeue")
    # Slurm does not show it.
    options += [word for word in environ.get("LLAVA_SBATCH", "").split() if word.startswith("--signal=")]
    for key, option in _OPTIONS.items():
        value = shown.get(key, "(null)")
        if value in ("", "(null)", "N/A", "0", "UNLIMITED"):
            continue
        if key.startswith("Tres"):
            value = value.removeprefix("gres:")
            value = value if key == "TresPerNode" else value.removeprefix("gpu:")
        options.append(f"{option}={value}")
    return options


def clean_environ(environ: Mapping[str, str], job: str) -> dict[str, str]:
    """The environment without what belongs to this start of this job; the new one knows which it goes on with."""
    kept = {key: value for key, value in environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    kept.pop(START_VARIABLE, None)
    return kept | {SUCCEEDS_VARIABLE: job}


def _dependents(job: str) -> list[tuple[str, str]]:
    """Jobs that wait for one, with what they wait for: (id, ``afterany:12``)."""
    lines = _run(["squeue", "--noheader", "--me", "--states=PENDING", "--format=%i|%E"]).splitlines()
    pairs = [line.split("|", 1) for line in lines if "|" in line]
    return [
        (waiting, re.sub(r"\([^)]*\)", "", dependency))
        for waiting, dependency in pairs
        if re.search(rf":{job}\b", dependency)
    ]


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{' '.join(command[:4])}: {error}") from error
    if done.returncode:
        raise ConfigError(f"{' '.join(command[:4])}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def main() -> None:
    """Submits a job anew and prints the new one's id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--exclude", default="")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    try:
        print(resubmit(asked.job, asked.script, asked.arguments, [node for node in asked.exclude.split(",") if node]))
    except ConfigError as error:
        sys.exit(f"the job cannot be submitted again: {error}")


if __name__ == "__main__":
    main()
