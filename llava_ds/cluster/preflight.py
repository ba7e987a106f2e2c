"""Looks at all nodes of a job before a model is loaded, in seconds: one process per node, exit code 0, 1 or 3.

Every process looks at its node and puts a report into rank 0's store; rank 0 waits for all, names those that never
came, compares the others, lets all measure their links together, and tells all with which code to end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from llava_ds.cluster.bandwidth import LinkRates, measure_links
from llava_ds.cluster.link_problems import Test, find_link_problems, find_missing, settle_pairs
from llava_ds.cluster.node_problems import Limits, Problem, find_problems
from llava_ds.cluster.node_report import NodeReport, look_at_node, node_name
from llava_ds.cluster.preflight_result import PreflightResult, summarize, write_result
from llava_ds.cluster.rendezvous import BAD_NODES_CODE, Rendezvous
from llava_ds.config import load_recipe
from llava_ds.distributed import Ranks, apply_launcher_environment

_LEAVING_S = 5.0
"""So long rank 0's store stays for the others to read how it ended."""


@dataclass(frozen=True)
class PreflightSettings:
    """What is looked at, and what is still good."""

    recipe: str
    run_dir: Path
    overrides: Sequence[str] = ()
    report_file: Path | None = None
    nodes: Sequence[str] = ()
    """The names of all nodes; without them one that never comes is known by its rank only."""
    wait_s: float = 60.0
    """For the reports of all nodes."""
    limit_s: float = 60.0
    """For measuring the links."""
    slow_frac: float = 0.5
    """A node is slow below this share of the median rate."""
    min_bytes_per_s: float = 0.0
    """A node is slow below this rate, whatever the others have."""
    limits: Limits = field(default_factory=Limits)


def run_preflight(settings: PreflightSettings) -> int:
    """The preflight of one process. Returns the exit code, the same on every rank; end the process with it at once,
    as threads may still hang in what does not answer.

    Raises ConfigError when the launcher's variables are not whole.
    """
    started = time.monotonic()
    ranks = apply_launcher_environment(os.environ)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    try:
        place = Rendezvous(ranks, address, port if ranks.world_size > 1 else 0, settings.wait_s)
        place.put("here", node_name())
        _in_background(lambda: place.put("report", _look(place, settings).as_dict()))
        if ranks.is_main:
            _lead(place, settings, started)
        elif place.decision("measure", settings.wait_s):
            _in_background(lambda: _measure(place, settings))
        code = int(place.decision("code", settings.limit_s))
        place.put("left", True)
        if ranks.is_main:
            _let_the_others_leave(place)
        return code
    except DistError as error:
        print(_describe_loss(ranks, f"{address}:{port}", settings.wait_s, error), file=sys.stderr)
        return BAD_NODES_CODE


def _describe_loss(ranks: Ranks, where: str, wait_s: float, error: DistError) -> str:
    reason = str(error).splitlines()[0]
    if ranks.is_main:
        return f"preflight: rank 0 cannot listen at {where}: {reason}\n  Set another MASTER_PORT; the next one is used."
    return (
        f"preflight: rank {ranks.rank} on {node_name()} has no connection to rank 0 at {where} (it waits {wait_s:g} s "
        f"for one): {reason}\n  Look at the node of rank 0, and at what MASTER_ADDR means here."
    )


def _in_background(work: Callable[[], Any]) -> None:
    """In a thread that nobody waits for: a disk or a network that does not answer holds up that thread only."""

    def run() -> None:
        try:
            work()
        except DistError:
            return  # rank 0 is gone, which the main thread finds as well

    threading.Thread(target=run, daemon=True).start()


def _look(place: Rendezvous, settings: PreflightSettings) -> NodeReport:
    """This node's report; whatever goes wrong stands in it."""
    try:
        config = load_recipe(settings.recipe, settings.overrides)
        return look_at_node(config, settings.run_dir, node_name(), lambda what: place.put("looking", what))
    except Exception as error:
        return NodeReport(node_name(), error=f"{type(error).__name__}: {error}")


def _measure(place: Rendezvous, settings: PreflightSettings) -> None:
    """Puts this node's test, again at every stage; whatever goes wrong stands in it."""
    test = Test()

    def note(stage: str) -> None:
        nonlocal test
        test = Test(num_stages=test.num_stages + 1, stage=stage)
        place.put("stage", asdict(test))

    try:
        rates = measure_links(place.ranks, place.connect_again(settings.limit_s), settings.limit_s, note)
        test = replace(test, rates=rates)
    except Exception as error:
        test = replace(test, error=f"{type(error).__name__}: {error}")
    place.put("test", asdict(test))


def _lead(place: Rendezvous, settings: PreflightSettings, started: float) -> None:
    """Rank 0's part: hears all, decides, writes and prints."""
    found = [raw and NodeReport.from_dict(raw) for raw in place.gather("report", settings.wait_s)]
    reports = [report for report in found if report is not None]
    problems = _find_missing(place, found, settings) + find_problems(reports, settings.limits)
    rates: dict[str, LinkRates] = {}
    if _can_measure(place.ranks, reports, problems):
        tests = _measure_all(place, settings, [report.node for report in reports])
        problems += find_link_problems(tests, settings.limit_s, settings.slow_frac, settings.min_bytes_per_s)
        rates = {node: test.rates for node, test in tests.items() if test.rates}
    else:
        place.decide("measure", False)
    seconds = time.monotonic() - started
    result = PreflightResult(settings.recipe, str(settings.run_dir), reports, rates, problems, seconds)
    result = _write(result, settings.report_file)
    print(summarize(result), flush=True)
    place.decide("code", result.code)


def _find_missing(
    place: Rendezvous, found: Sequence[NodeReport | None], settings: PreflightSettings
) -> list[Problem]:
    seen, last = place.gather("here", 0), place.gather("looking", 0)
    reported = [report is not None for report in found]
    return find_missing(seen, reported, last, settings.nodes, settings.wait_s)


def _can_measure(ranks: Ranks, reports: Sequence[NodeReport], problems: Sequence[Problem]) -> bool:
    in_the_way = {"no_report", "several_processes"}
    all_failed = all(report.error for report in reports)
    return ranks.world_size > 1 and not all_failed and not any(problem.kind in in_the_way for problem in problems)


def _measure_all(place: Rendezvous, settings: PreflightSettings, nodes: Sequence[str]) -> dict[str, Test]:
    """What became of the test on every node, within the time limit."""
    place.decide("measure", True)
    _in_background(lambda: _measure(place, settings))
    ended = place.gather("test", settings.limit_s, hurry=lambda test: bool(test["error"]))
    stages = place.gather("stage", 0)
    gone = [] if all(ended) else place.find_silent()
    tests = [_read_test(end or stage) for end, stage in zip(ended, stages, strict=True)]
    tests = [replace(test, answers=rank not in gone) for rank, test in enumerate(tests)]
    return settle_pairs(dict(zip(nodes, tests, strict=True)))


def _read_test(raw: dict[str, Any] | None) -> Test:
    if raw is None:
        return Test()
    return Test(**{**raw, "rates": raw["rates"] and LinkRates(**raw["rates"])})


def _write(result: PreflightResult, file: Path | None) -> PreflightResult:
    """Writes the JSON file; where that fails, the result says so."""
    if file is None:
        return result
    try:
        write_result(result, file)
    except OSError as error:
        text = f"--report {file} cannot be written: {error}. Give another file."
        return replace(result, problems=[*result.problems, Problem(None, "report_file", text)])
    return result


def _let_the_others_leave(place: Rendezvous) -> None:
    """Waits until those that came have read the code."""
    here = place.gather("here", 0)
    deadline = time.monotonic() + _LEAVING_S
    while time.monotonic() < deadline:
        left = place.gather("left", 0)
        if all(gone for node, gone in zip(here, left, strict=True) if node is not None):
            return
        time.sleep(0.05)
