"""Pairs meet without waiting for others; the slow node, the stuck one and the one that never came are named."""

import pytest
import torch

from llava_ds.cluster.bandwidth import LinkRates, _first_difference, find_slow, plan_partners
from llava_ds.cluster.link_problems import Test, best_rate, find_link_problems, find_missing, settle_pairs


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 9, 64, 1023, 1024])
def test_partners_of_a_round_have_each_other_and_change(world_size):
    plans = [plan_partners(rank, world_size) for rank in range(world_size)]
    num_rounds = min(4, world_size - 1 + world_size % 2)
    for rank, plan in enumerate(plans):
        assert len(plan) == num_rounds
        partners = [partner for partner in plan if partner is not None]
        assert len(set(partners)) == len(partners) >= num_rounds - (world_size % 2)
        for number, partner in enumerate(plan):
            assert partner != rank
            assert partner is None or plans[partner][number] == rank


def _tests(rates, default=1e9):
    """What nodes measure when a pair is as fast as its slower end: ``rates`` by rank, the others ``default``."""
    nodes = [f"n{rank}" for rank in range(6)]
    speed = [rates.get(rank, default) for rank in range(len(nodes))]
    return {
        node: Test(LinkRates(1e8, [(p, min(speed[rank], speed[p])) for p in plan_partners(rank, 6) if p is not None]))
        for rank, node in enumerate(nodes)
    }


def test_of_the_two_ends_of_a_pair_the_lower_rate_counts():
    tests = {
        "a": Test(LinkRates(1.0, [(1, 5.0), (2, 9.0)])), "b": Test(LinkRates(1.0, [(0, 7.0)])), "c": Test(error="died"),
    }
    settled = settle_pairs(tests)
    assert settled["a"].rates.pairs == [(1, 5.0), (2, 9.0)]
    assert settled["b"].rates.pairs == [(0, 5.0)]
    assert settled["c"] == tests["c"]


def test_only_the_slow_node_is_slow_and_not_its_partners():
    problems = find_link_problems(_tests({4: 1e8}), 60)
    assert [(p.node, p.kind, p.certain) for p in problems] == [("n4", "slow", True)]
    says = "0.1 GB/s each way with its best of 4 partner(s), less than 0.5 GB/s; the median node has 1 GB/s"
    assert says in problems[0].message
    assert [p.node for p in find_link_problems(_tests({1: 4e8, 2: 3e8}), 60)] == ["n1", "n2"]
    assert find_link_problems(_tests({4: 6e8}), 60) == []
    assert find_link_problems(_tests({4: 1e8}), 60, slow_frac=0.05) == []


def test_slow_is_below_a_share_of_the_median_or_below_a_rate():
    rates = {"a": 10.0, "b": 9.0, "c": 11.0, "d": 4.7}
    assert find_slow(rates) == ["d"]
    assert find_slow(rates, 0.4) == []
    assert find_slow(rates, 0.0, 9.5) == ["b", "d"]
    assert find_slow({}) == []
    assert find_slow({"a": 1.0}) == []
    assert find_slow({"a": 1.0, "b": 1.1}) == []
    assert find_slow({"a": 1.0, "b": 1.1}, 0.5, 1.05) == ["a", "b"]


def test_of_two_nodes_the_link_is_named():
    tests = {"a": Test(LinkRates(1e8, [(1, 1e8)])), "b": Test(LinkRates(1e8, [(0, 1.1e8)]))}
    assert find_link_problems(tests, 60) == []
    problems = find_link_problems(tests, 60, min_bytes_per_s=1e9)
    assert [(p.node, p.kind, p.certain) for p in problems] == [("a", "slow", False), ("b", "slow", False)]
    assert "the link between a and b carries 0.1 GB/s each way, less than 1 GB/s" in problems[0].message


def test_a_network_that_is_slow_everywhere_is_a_problem_of_the_settings():
    problems = find_link_problems(_tests({}), 60, min_bytes_per_s=1e10)
    assert [(p.node, p.kind) for p in problems] == [(None, "slow")]


def test_a_wrong_sum_is_named_on_the_node_that_has_it():
    tests = _tests({})
    tests["n2"] = Test(LinkRates(1e8, tests["n2"].rates.pairs, wrong_sum="1 of 9 sums are wrong"))
    problems = find_link_problems(tests, 60)
    assert [(p.node, p.kind) for p in problems] == [("n2", "wrong_sum")]
    assert "all-reduce: 1 of 9 sums are wrong, on 1 of 6 nodes" in problems[0].message


def test_the_first_number_that_differs_is_said_with_both_values():
    expected = torch.tensor([3.0, 5.0, 7.0])
    assert _first_difference(expected.clone(), expected) == ""
    wrong = torch.tensor([3.0, 6.0, 8.0])
    assert _first_difference(wrong, expected) == "2 of 3 sums are wrong, the first at 1: 6.0 for 5.0"


def test_the_rate_of_a_node_is_its_best():
    assert best_rate(LinkRates(1.0, [(1, 5.0), (2, 7.0), (3, 6.0)])) == 7
    assert best_rate(LinkRates(1.0)) == 0


DONE = Test(LinkRates(1.0, [(1, 1.0)]), num_stages=6)
WAITS = Test(num_stages=2, stage="all-reduce")
BEHIND = Test(num_stages=1, stage="connecting all nodes")
GONE = Test(answers=False, num_stages=2, stage="all-reduce")
LOST = Test(error="RuntimeError: Connection closed by peer", num_stages=2, stage="all-reduce")


@pytest.mark.parametrize(
    ("tests", "named", "certain"),
    [
        ([WAITS, WAITS, BEHIND, WAITS], ["n2"], True),
        ([WAITS, Test()], ["n1"], True),
        ([LOST, LOST, WAITS], ["n2"], True),  # it died, the others lost it
        ([WAITS, WAITS, LOST], ["n2"], True),  # it failed, the others wait for it
        ([DONE, DONE, DONE, LOST], ["n3"], True),
        ([BEHIND, WAITS, BEHIND, WAITS], ["n0", "n2"], False),  # two ends of a link
        ([WAITS, LOST], ["n0", "n1"], False),
        ([WAITS, WAITS, GONE, WAITS, WAITS, GONE], ["n2", "n5"], True),
        ([WAITS, LOST, GONE, LOST], ["n2"], True),
        ([WAITS, GONE, GONE], ["n0"], True),  # rank 0 itself is cut off
        ([WAITS, GONE], ["n0", "n1"], False),
        ([WAITS, WAITS], ["n0", "n1"], False),
        ([WAITS, WAITS, WAITS], [None], True),
        ([LOST, LOST, LOST], [None], True),
    ],
)
def test_the_node_that_all_others_wait_for_is_named(tests, named, certain):
    problems = find_link_problems({f"n{rank}": test for rank, test in enumerate(tests)}, 60)
    assert [problem.node for problem in problems] == named
    assert {problem.certain for problem in problems} == {certain}
    assert {problem.kind for problem in problems} == {"stuck"}


def test_a_stuck_node_is_told_with_its_stage_or_its_error():
    message = find_link_problems({"a": WAITS, "b": WAITS, "c": BEHIND}, 30)[0].message
    assert "did not end (limit 30 s): it stands at 'connecting all nodes'." in message
    message = find_link_problems({"a": WAITS, "b": WAITS, "c": GONE}, 30)[0].message
    assert "it stands at 'all-reduce' and does not answer rank 0 any more; it died, or is cut off." in message
    message = find_link_problems({"a": WAITS, "b": WAITS, "c": LOST}, 30)[0].message
    assert "failed at 'all-reduce': RuntimeError: Connection closed by peer." in message


def _missing(seen, nodes, reported=None):
    reported = reported or [node is not None for node in seen]
    last = ["data.path=/mnt/x" if node else None for node in seen]
    return [(p.node, p.kind, p.certain) for p in find_missing(seen, reported, last, nodes, 60)]


def test_a_node_that_never_came_is_named():
    assert _missing(["a", "b", "c"], ["a", "b", "c"]) == []
    assert _missing(["a", "b", "c"], []) == []
    assert _missing(["a", None, "c"], ["a", "b", "c"]) == [("b", "no_report", True)]
    assert _missing(["a.cluster", None, "c.cluster"], ["a", "b", "c"]) == [("b", "no_report", True)]
    assert _missing(["c", None, None], ["a", "b", "c"]) == [("a", "no_report", True), ("b", "no_report", True)]


def test_a_node_without_a_task_is_named_and_one_without_a_name_is_a_rank():
    assert _missing(["a", "b"], ["a", "b", "c"]) == [("c", "no_report", True)]
    assert _missing(["a", None, "c"], []) == [("rank 1", "no_report", False)]
    assert _missing(["x", None, "y"], ["a", "b", "c"]) == [("rank 1", "no_report", False)]
    assert _missing(["x", "y"], ["a", "b", "c"]) == [(None, "no_report", True)]


def test_a_node_that_came_and_did_not_report_is_named_with_what_it_looked_at():
    assert _missing(["a", "b", "c"], [], [True, False, True]) == [("b", "no_report", True)]
    problem = find_missing(["a", "b"], [True, False], [None, "data.path=/mnt/x"], [], 60)[0]
    assert "did not report within 60 s; it was looking at data.path=/mnt/x." in problem.message
