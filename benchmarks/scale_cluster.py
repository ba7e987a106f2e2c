"""Part of thousand_ranks.py: preflight, merged logs and the watchdog."""

from __future__ import annotations

import json
import resource
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

from scale_child import CheckFailedError, Figures, check, timed
from torch.distributed import TCPStore

from llava_ds.cluster.bandwidth import LinkRates, plan_partners
from llava_ds.cluster.link_problems import Test, find_link_problems
from llava_ds.cluster.log_view import read_log
from llava_ds.cluster.node_paths import PathReport
from llava_ds.cluster.node_places import Place
from llava_ds.cluster.node_problems import find_problems
from llava_ds.cluster.node_report import NodeReport
from llava_ds.cluster.rank_logs import merged_lines
from llava_ds.engine.beats import Beat, find_hang
from llava_ds.starts import rank_log

MAX_OPEN_FILES = 256
_FEWEST_NODES = 8
"""With fewer, no majority tells which node is wrong."""
_NUM_CLIENTS = 4
_ROUNDS = 5
_TIMEOUT_S = 900.0


def measure_preflight(num_ranks: int) -> Figures:
    """As many nodes as ranks, the most that there could be; eight ranks a node are checked as well."""
    _find_planted(max(_FEWEST_NODES, num_ranks // 8))
    return _find_planted(num_ranks)


def _find_planted(num_nodes: int) -> Figures:
    """One report a node, with three faults among them: those are named, and nothing else is."""
    figures: Figures = {}
    sent = [json.dumps(report.as_dict()) for report in _reports(num_nodes)]
    with timed(figures, "preflight_find_cpu_ms"):
        problems = find_problems([NodeReport.from_dict(json.loads(raw)) for raw in sent])
    found = {(problem.node, problem.kind) for problem in problems}
    planted = {(_node(1), "missing_path"), (_node(num_nodes // 2), "versions"), (_node(num_nodes - 1), "disk")}
    check(found == planted, f"{num_nodes} nodes: planted {sorted(planted)}, found {sorted(map(str, found))[:6]}")
    figures["preflight_sent_kb"] = sum(map(len, sent)) / 1e3
    with timed(figures, "preflight_links_cpu_ms"):
        slow = find_link_problems(_tests(num_nodes, slow=num_nodes // 3), 60.0)
    named = [(problem.node, problem.kind) for problem in slow]
    check(named == [(_node(num_nodes // 3), "slow")], f"{num_nodes} nodes: one has a slow link, named were {named[:6]}")
    return figures


def _node(number: int) -> str:
    return f"node{number:04d}"


def _reports(num_nodes: int) -> list[NodeReport]:
    """Nodes alike, but for a missing path, an older package and a full disk."""
    path = PathReport("/data/train.json", "file", 10**9, 0, "0" * 32)
    place = Place("/shared/runs", 1 << 42)
    alike = NodeReport(
        "", host="host", versions={name: "1.0" for name in ("python", "torch", "deepspeed", "transformers", "nccl")},
        code_hash="a" * 32, recipe_hash="b" * 32, num_workers=4, gpus=["GPU"] * 8, num_cpus=96,
        paths={"data.path": path, "model.llm": replace(path, path="/models/llm", kind="folder", num_entries=12)},
        places={name: place for name in ("run_dir", "tmp", "shm", "cache")},
    )
    reports = [replace(alike, node=_node(number)) for number in range(num_nodes)]
    reports[1] = replace(reports[1], paths={**alike.paths, "data.path": PathReport("/data/train.json", "missing")})
    other = num_nodes // 2
    reports[other] = replace(reports[other], versions={**alike.versions, "deepspeed": "0.9"})
    reports[-1] = replace(reports[-1], places={**alike.places, "run_dir": Place("/shared/runs", 1 << 20)})
    return reports


def _tests(num_nodes: int, slow: int) -> dict[str, Test]:
    """What each node measured with its partners, one of them ten times slower than the others."""
    partners = [plan_partners(rank, num_nodes) for rank in range(num_nodes)]
    for rank, rounds in enumerate(partners):
        mutual = all(partners[other][number] == rank for number, other in enumerate(rounds) if other is not None)
        check(mutual, f"of {num_nodes} nodes, {rank} exchanges with one that exchanges with another")
    return {
        _node(rank): Test(LinkRates(1e10, [(p, 1e9 if slow in (rank, p) else 1e10) for p in rounds if p is not None]))
        for rank, rounds in enumerate(partners)
    }


def write_logs(folder: Path, num_ranks: int, num_lines: int) -> None:
    """A log a rank: every second line is printed by all of them at about the same time."""
    folder.mkdir(parents=True)
    begin = datetime(2026, 11, 25, 13)
    for rank in range(num_ranks):
        lines = []
        for number in range(num_lines):
            time = begin + timedelta(seconds=3 * number, microseconds=(rank * 7919 + number) % 999_983)
            own = f"rank={rank}: line {number} is printed by this rank" if number % 2 else f"step {number} is done"
            lines.append(f"{time.isoformat(timespec='microseconds')} {own}\n")
        rank_log(folder, rank).write_text("".join(lines))


def measure_logs(folder: Path, num_ranks: int, num_lines: int) -> Figures:
    """All logs as one, with fewer open files than ranks: every line once, by time, each rank's in its order."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    figures: Figures = {}
    last, counts = "", [0] * num_ranks
    with timed(figures, "logs_merge_line_cpu_us", num_ranks * num_lines):
        for line in merged_lines(folder):
            if line.time_text < last or f" {counts[line.rank]} " not in line.text:
                raise CheckFailedError(f"{line} comes after {last}, as line {counts[line.rank]} of its rank")
            last, counts[line.rank] = line.time_text, counts[line.rank] + 1
    check(set(counts) == {num_lines}, f"{sum(counts)} of {num_ranks * num_lines} lines were merged")
    with timed(figures, "logs_last_20_cpu_s"):
        shown = list(read_log(folder, last=20))
    check(len(shown) == 20, f"{len(shown)} lines are shown, not the last 20")
    with timed(figures, "logs_together_line_cpu_us", num_ranks * num_lines):
        together = sum(len(line.ranks) == num_ranks for line in read_log(folder))
    check(together == -(-num_lines // 2), f"{together} of {num_lines} lines stand once for all ranks, not half of them")
    return figures


def measure_watchdog(num_ranks: int) -> Figures:
    """Who hangs among all beats, and a round of beats through a store on this machine."""
    figures: Figures = {}
    beats = [
        Beat(rank, f"node{rank // 8:04d}.cluster", 5000, "backward", 700, 5.0, _SAMPLES) for rank in range(num_ranks)
    ]
    hung = num_ranks * 2 // 3
    late = [replace(beat, still_s=1000.0, stack=_STACK) for beat in beats]
    behind = [replace(beat, count=4999, phase="reading data") if beat.rank == hung else beat for beat in late]
    heard = {rank: 1.0 for rank in range(num_ranks)}
    with timed(figures, "watchdog_find_cpu_ms", 4):
        _expect(find_hang(beats, heard, _TIMEOUT_S), None)
        _expect(find_hang(behind, heard, _TIMEOUT_S), (hung,))
        _expect(find_hang(beats, {**heard, hung: 1000.0}, _TIMEOUT_S), (hung,))
        _expect(find_hang(late, heard, _TIMEOUT_S), ())
    figures |= _exchange(beats, "")
    figures |= _exchange(behind, "_late")
    return figures


_SAMPLES = tuple(f"{number:012d}" for number in range(8))
_STACK = 'File "/somewhere/torch/distributed/distributed_c10d.py", line 2906, in all_reduce\n    work.wait()\n' * 14


def _expect(found: object, ranks: tuple[int, ...] | None) -> None:
    named = getattr(found, "ranks", None)
    check(named == ranks, f"ranks {ranks} hang, found was {named}")


def _exchange(beats: Sequence[Beat], suffix: str) -> Figures:
    """A round as it goes every few seconds: each rank sets its beat, and rank 0 gets all of them at once.

    A few threads stand for the ranks, each with a connection of its own; the numbers are medians.
    """
    values = {f"beat/{beat.rank}": json.dumps(asdict(beat)) for beat in beats}
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    clients = [
        TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=30), wait_for_workers=False)
        for _ in range(_NUM_CLIENTS)
    ]
    rounds: list[Figures] = []
    for _ in range(_ROUNDS):
        one: Figures = {}
        with timed(one, f"watchdog{suffix}_set_all_ms"):
            _in_threads(clients, lambda client, share: [client.set(k, values[k]) for k in share], list(values))
        with timed(one, f"watchdog{suffix}_get_all_ms"):
            raw = store.multi_get(list(values))
        with timed(one, f"watchdog{suffix}_read_all_cpu_ms"):
            heard = [Beat(**{**said, "samples": tuple(said["samples"])}) for said in map(json.loads, raw)]
        check(heard == list(beats), "the beats in the store are not those that were set")
        rounds.append(one)
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {**medians, f"watchdog{suffix}_beat_bytes": statistics.median(map(len, values.values()))}


def _in_threads(
    clients: Sequence[TCPStore], work: Callable[[TCPStore, Sequence[str]], object], keys: Sequence[str]
) -> None:
    threads = [
        threading.Thread(target=work, args=(client, keys[number :: len(clients)]))
        for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
