"""What a preflight found: the exit code, the summary for people, the JSON file for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_ds.cluster.bandwidth import LinkRates
from llava_ds.cluster.link_problems import best_rate, format_rate
from llava_ds.cluster.node_problems import Problem, format_bytes
from llava_ds.cluster.node_report import NodeReport
from llava_ds.cluster.rendezvous import BAD_NODES_CODE

SETTINGS_CODE = 1


@dataclass(frozen=True)
class PreflightResult:
    """Everything that rank 0 knows at the end."""

    recipe: str
    run_dir: str
    reports: Sequence[NodeReport]
    """In the order of ranks, without the nodes that did not report."""
    rates: Mapping[str, LinkRates]
    """By node; empty where nothing was measured."""
    problems: Sequence[Problem]
    seconds: float

    @property
    def code(self) -> int:
        """0: fine; 1: the settings are wrong, which other nodes do not cure; 3: nodes are named."""
        if any(problem.node is None for problem in self.problems):
            return SETTINGS_CODE
        return BAD_NODES_CODE if self.problems else 0

    @property
    def bad_nodes(self) -> list[str]:
        """The nodes that are certainly to blame: a job can be started again without them."""
        return _names(problem for problem in self.problems if problem.certain)

    @property
    def suspects(self) -> list[str]:
        """Further nodes (or, where a name is not known, ranks) of which some are to blame."""
        bad = set(self.bad_nodes)
        return [name for name in _names(self.problems) if name not in bad]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "code": self.code,
            "bad_nodes": self.bad_nodes,
            "suspects": self.suspects,
            "problems": [asdict(problem) for problem in self.problems],
            "recipe": self.recipe,
            "run_dir": self.run_dir,
            "seconds": round(self.seconds, 3),
            "nodes": [report.as_dict() | {"links": self._links(report.node)} for report in self.reports],
        }

    def _links(self, node: str) -> dict[str, Any] | None:
        rates = self.rates.get(node)
        return asdict(rates) | {"best_bytes_per_s": best_rate(rates)} if rates else None


def _names(problems: Any) -> list[str]:
    """The nodes of problems, each once, in their order."""
    return list(dict.fromkeys(problem.node for problem in problems if problem.node is not None))


def summarize(result: PreflightResult) -> str:
    """A line for each node, then a line for each problem, then what to do."""
    lines = [f"preflight of {result.recipe}: {len(result.reports)} node(s) reported, {result.seconds:.1f} s"]
    width = max((len(report.node) for report in result.reports), default=0)
    lines += [f"  {report.node:{width}}  {_describe_node(report, result)}" for report in result.reports]
    lines += [f"  note: {note}" for note in dict.fromkeys(note for report in result.reports for note in report.notes)]
    lines += [f"PROBLEM {_who(problem)}: {problem.message}" for problem in result.problems]
    return "\n".join([*lines, _conclude(result)])


def _describe_node(report: NodeReport, result: PreflightResult) -> str:
    if report.error:
        return "could not look"
    rates = result.rates.get(report.node)
    rate = format_rate(best_rate(rates)) if rates else "not measured"
    run_dir = report.places.get("run_dir")
    free = f"{format_bytes(run_dir.free_bytes)} free for the run" if run_dir else "disk not looked at"
    gpus = f"{len(report.gpus)} x {report.gpus[0]}" if report.gpus else "no GPU"
    return f"{rate:>12}  {free}  {gpus}  {report.num_cpus} CPUs"


def _who(problem: Problem) -> str:
    if problem.node is None:
        return f"of the settings ({problem.kind})"
    return f"{'on' if problem.certain else 'perhaps on'} {problem.node} ({problem.kind})"


def _conclude(result: PreflightResult) -> str:
    if not result.problems:
        return "preflight: all is well"
    if result.code == SETTINGS_CODE:
        return "preflight: correct the settings; other nodes would not help"
    if result.bad_nodes:
        return f"preflight: start without {','.join(result.bad_nodes)} (sbatch --exclude), or repair them"
    return f"preflight: look at {','.join(result.suspects)}"


def write_result(result: PreflightResult, file: Path) -> None:
    """Writes the JSON file: whole, or not at all. Raises OSError when it cannot be written."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    partial.replace(file)
