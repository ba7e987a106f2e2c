"""Which nodes are missing, get stuck, or are slow in what all nodes do together: pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llava_ds.cluster.bandwidth import LinkRates, find_slow
from llava_ds.cluster.node_problems import Problem, blame, name_some

_MAX_TEXTS = 4
_INTERFACE = (
    "Look at its network, and at NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and what its host name resolves to."
)


@dataclass(frozen=True)
class Test:
    """What became of the bandwidth test on one node: rates, or an error, or neither when it did not end."""

    __test__ = False  # nothing for pytest

    rates: LinkRates | None = None
    error: str = ""
    answers: bool = True
    """Whether its process still asked rank 0 for a decision when others had waited in vain."""
    num_stages: int = 0
    stage: str = "not begun"
    """What it was at when it was last heard of, its ``num_stages``-th."""


def find_missing(
    seen: Sequence[str | None],
    reported: Sequence[bool],
    last: Sequence[str | None],
    nodes: Sequence[str],
    wait_s: float,
) -> list[Problem]:
    """The nodes that did not report within ``wait_s``.

    Args:
        seen: [world_size] the node of each rank that has come.
        reported: [world_size] whether it reported.
        last: [world_size] what it looked at when it was last heard of.
        nodes: the names of all nodes, where they are known; only these can name one that never came.
    """
    stuck = [
        Problem(
            node, "no_report",
            f"it came, but did not report within {wait_s:g} s; it was looking at {what or 'nothing yet'}. "
            "A disk behind a network that does not answer?",
        )
        for node, done, what in zip(seen, reported, last, strict=True) if node is not None and not done
    ]
    return stuck + _never_came(seen, nodes, wait_s)


def _never_came(seen: Sequence[str | None], nodes: Sequence[str], wait_s: float) -> list[Problem]:
    came = [node for node in seen if node is not None]
    short_names = {_short(node) for node in came}
    absent = [node for node in nodes if _short(node) not in short_names]
    num_absent = max(len(seen), len(nodes)) - len(came)
    text = f"it did not come within {wait_s:g} s; {len(came)} of {max(len(seen), len(nodes))} nodes did."
    if len(absent) == num_absent:
        advice = "Look whether it is up, and whether srun started a task there."
        return [Problem(node, "no_report", f"{text} {advice}") for node in absent]
    ranks = [rank for rank, node in enumerate(seen) if node is None]
    if num_absent and not ranks:
        names = f"--nodes names {name_some(nodes)}, but {name_some(came)} came"
        return [Problem(None, "no_report", f"{names}. Give the names that Slurm uses, and start a task on each.")]
    advice = "Give --nodes the names of all nodes, then it can be named."
    return [Problem(f"rank {rank}", "no_report", f"{text} {advice}", certain=False) for rank in ranks]


def _short(node: str) -> str:
    """A host's name without its domain."""
    return node.split(".")[0]


def find_link_problems(
    tests: Mapping[str, Test], limit_s: float, slow_frac: float = 0.5, min_bytes_per_s: float = 0.0
) -> list[Problem]:
    """What went wrong when all nodes exchanged numbers; ``tests`` are by node, in the order of ranks."""
    if not all(test.rates for test in tests.values()):
        return _find_stuck(tests, limit_s)
    rates = {node: test.rates for node, test in tests.items() if test.rates}
    wrong = {node: f"all-reduce: {rate.wrong_sum}" for node, rate in rates.items() if rate.wrong_sum}
    return [
        *blame("wrong_sum", wrong, len(rates), "Its memory, GPU or network card may be broken."),
        *_slow(rates, slow_frac, min_bytes_per_s),
    ]


def _find_stuck(tests: Mapping[str, Test], limit_s: float) -> list[Problem]:
    odd = _odd_ones(tests)
    if odd:
        certain = len(odd) == 1 or not all(tests[node].answers for node in odd)
        texts = {node: f"{_describe(tests[node], limit_s)} {_INTERFACE}" for node in odd}
        return [Problem(node, "stuck", text, certain) for node, text in texts.items()]
    waiting = [node for node, test in tests.items() if not test.rates]
    text = "; ".join(f"{node}: {_describe(tests[node], limit_s)}" for node in waiting[:_MAX_TEXTS])
    if len(tests) == 2:
        return [Problem(node, "stuck", f"{text} {_INTERFACE}", certain=False) for node in tests]
    return [Problem(None, "stuck", f"no node stands out of {name_some(waiting)}. {text} {_INTERFACE}")]


def _odd_ones(tests: Mapping[str, Test]) -> list[str]:
    """One node that fails or hangs leaves the others waiting, or failing because of it: those unlike the most.

    Of nodes that all fail, or all wait, these are the ones that got least far; none where that is most of them.
    """
    gone = [node for node, test in tests.items() if not test.answers]
    if gone:
        # Where rank 0 is the one that is cut off, it finds all others gone.
        return _smaller(gone, [node for node, test in tests.items() if test.answers])
    failed = [node for node, test in tests.items() if test.error]
    silent = [node for node, test in tests.items() if not test.error and not test.rates]
    if failed and silent:
        return _smaller(failed, silent)
    first = min(tests[node].num_stages for node in failed or silent)
    behind = [node for node in failed or silent if tests[node].num_stages == first]
    return behind if 2 * len(behind) <= len(tests) else []


def _smaller(first: list[str], second: list[str]) -> list[str]:
    return [] if len(first) == len(second) else min(first, second, key=len)


def _describe(test: Test, limit_s: float) -> str:
    if test.error:
        return f"the bandwidth test failed at {test.stage!r}: {test.error.splitlines()[0]}."
    text = f"the bandwidth test did not end (limit {limit_s:g} s): it stands at {test.stage!r}"
    return f"{text}." if test.answers else f"{text} and does not answer rank 0 any more; it died, or is cut off."


def _slow(rates: Mapping[str, LinkRates], slow_frac: float, min_bytes_per_s: float) -> list[Problem]:
    best = {node: best_rate(rate) for node, rate in rates.items() if rate.pairs}
    slow = find_slow(best, slow_frac, min_bytes_per_s)
    if len(best) == 2 and slow:
        first, second = best
        text = f"the link between {first} and {second} carries {format_rate(min(best.values()))} each way, less than "
        text += f"{format_rate(min_bytes_per_s)}. One of its two ends is slow; a third node would tell which."
        return [Problem(node, "slow", text, certain=False) for node in slow]
    median = statistics.median(best.values()) if best else 0.0
    wanted = f"{format_rate(max(median * slow_frac, min_bytes_per_s))}; the median node has {format_rate(median)}"
    texts = {
        node: f"{format_rate(best[node])} each way with its best of {len(rates[node].pairs)} partner(s), "
        f"less than {wanted}" for node in slow
    }
    return blame("slow", texts, len(best), "Look at its network card, cable and switch port, and at who else uses it.")


def settle_pairs(tests: Mapping[str, Test]) -> dict[str, Test]:
    """The tests, by node in the order of ranks, with the lower of the two rates that the ends of a pair measured: bytes
    that are only on their way look sent to the one that sends them."""
    measured = {
        (rank, partner): rate
        for rank, test in enumerate(tests.values()) if test.rates for partner, rate in test.rates.pairs
    }
    settled = {}
    for rank, (node, test) in enumerate(tests.items()):
        if test.rates:
            pairs = [(partner, min(rate, measured.get((partner, rank), rate))) for partner, rate in test.rates.pairs]
            test = replace(test, rates=replace(test.rates, pairs=pairs))
        settled[node] = test
    return settled


def best_rate(rates: LinkRates) -> float:
    """Bytes per second of a node's best round: a slow partner does not make it slow. 0 where it had none."""
    return max((rate for _, rate in rates.pairs), default=0.0)


def format_rate(bytes_per_s: float) -> str:
    """In GB/s, for people."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"
