"""The node that differs from most others is named with both values; what is wrong everywhere names no node."""

import time
from dataclasses import replace

import pytest

from llava_ds.cluster.node_paths import PathReport
from llava_ds.cluster.node_places import Place
from llava_ds.cluster.node_problems import Limits, Problem, blame, compare, find_problems, format_bytes, name_some
from llava_ds.cluster.node_report import NodeReport

GIB = 1 << 30
DATA = PathReport("/data/train.json", "file", 12, 0, "aa")
TOWER = PathReport("/models/tower", "folder", 30, 2, "bb", required=False)
PLACES = {
    "run_dir": Place("/runs", 100 * GIB), "tmp": Place("/tmp", 5 * GIB), "shm": Place("/dev/shm", GIB),
    "cache": Place("/scratch/cache", GIB),
}


def _report(node, **changes):
    report = NodeReport(
        node, host=node, versions={"torch": "2.6.0", "numpy": "2.3.5"}, code_hash="c0de", recipe_hash="4ec1",
        num_workers=4, paths={"data.path": DATA, "model.vision_tower": TOWER}, places=dict(PLACES), gpus=["H100"] * 8,
        num_cpus=64,
    )
    return replace(report, **changes)


def _with_path(node, setting, path):
    return _report(node, paths={"data.path": DATA, "model.vision_tower": TOWER} | {setting: path})


def _with_place(node, name, place, **changes):
    return _report(node, places=PLACES | {name: place}, **changes)


def _named(problems):
    return [(problem.node, problem.kind) for problem in problems]


def test_equal_nodes_have_no_problem():
    assert find_problems([_report(node) for node in "abcd"]) == []
    assert find_problems([_report("a")]) == []
    assert find_problems([]) == []


@pytest.mark.parametrize(
    ("odd", "kind", "says"),
    [
        (_report("c", code_hash="0dd"), "code", "xxh128 0dd on this node, but c0de on 2 of 3 nodes"),
        (_report("c", recipe_hash="0dd"), "recipe", "xxh128 0dd on this node, but 4ec1 on 2 of 3 nodes"),
        (_report("c", versions={"torch": "2.5.1", "numpy": "2.3.5"}), "versions",
         "torch is 2.5.1 on this node, but 2.6.0 on 2 of 3 nodes"),
        (_report("c", versions={"torch": "2.6.0"}), "versions", "numpy is none on this node, but 2.3.5 on 2"),
        (_report("c", gpus=["H100"] * 7), "gpus", "7 GPU(s) on this node, but 8 GPU(s) on 2 of 3 nodes"),
        (_with_path("c", "data.path", PathReport("/data/train.json", "missing")), "missing_path",
         "data.path=/data/train.json is not there, on 1 of 3 nodes"),
        (_with_path("c", "data.path", PathReport("/data/train.json", "unreadable", error="stale handle")),
         "missing_path", "data.path=/data/train.json cannot be read (stale handle), on 1 of 3 nodes"),
        (_with_path("c", "model.vision_tower", PathReport("/models/tower", "missing", required=False)), "missing_path",
         "model.vision_tower=/models/tower is not there, on 1 of 3 nodes"),
        (_with_path("c", "data.path", replace(DATA, size_bytes=11, digest="dd")), "content",
         "data.path=/data/train.json is a file with 11 bytes and xxh128 dd on this node, but file with 12 bytes"),
        (_with_path("c", "model.vision_tower", replace(TOWER, num_entries=1)), "content",
         "folder with 30 bytes in 1 entries and xxh128 bb on this node, but folder with 30 bytes in 2 entries"),
        (_with_place("c", "run_dir", Place("/", 90 * GIB)), "run_dir", "is / on this node, but /runs on 2 of 3"),
        (_with_place("c", "run_dir", Place("/runs", 9 * GIB)), "disk",
         "run_dir /runs has 9.0 GiB free, less than 10.0 GiB, on 1 of 3 nodes"),
        (_with_place("c", "tmp", Place("/tmp", GIB - 1)), "disk", "tmp /tmp has 1024 MiB free, less than 1.0 GiB"),
        (_with_place("c", "shm", Place("/dev/shm", 64 << 20)), "disk", "shm /dev/shm has 64 MiB free, less than 256"),
        (_with_place("c", "cache", Place("/home", 0, "read-only")), "not_writable",
         "cache /home cannot be written: read-only, on 1 of 3 nodes"),
        (NodeReport("c", error="ConfigError: unknown recipe 'x'"), "failed", "ConfigError: unknown recipe 'x', on 1"),
    ],
)
def test_the_node_that_differs_is_named_with_both_values(odd, kind, says):
    for reports in ([odd, _report("a"), _report("b")], [_report("a"), odd, _report("b")]):
        problems = find_problems(reports)
        assert _named(problems) == [("c", kind)]
        assert problems[0].certain
        assert says in problems[0].message


def test_what_is_missing_everywhere_is_a_problem_of_the_settings():
    gone = PathReport("/data/train.json", "missing")
    problems = find_problems([_with_path(node, "data.path", gone) for node in "abc"])
    assert _named(problems) == [(None, "missing_path")]
    assert "data.path=/data/train.json is not there, on every node (a, b, c)." in problems[0].message


def test_what_most_nodes_lack_is_a_problem_of_the_settings_that_names_them():
    gone = PathReport("/data/train.json", "missing")
    reports = [_report("a"), *(_with_path(node, "data.path", gone) for node in "bc")]
    assert _named(find_problems(reports)) == [(None, "missing_path")]
    assert "on 2 of 3 nodes (b, c)" in find_problems(reports)[0].message


def test_a_name_is_missing_nowhere_as_a_path():
    name = PathReport("/models/ViT-L-14", "missing", required=False)
    assert find_problems([_with_path(node, "model.vision_tower", name) for node in "abc"]) == []


def test_a_cache_of_features_may_differ():
    caches = [PathReport("/features", "folder", size, 1, str(size), required=False, compared=False) for size in (1, 2)]
    reports = [_with_path(node, "data.feature_cache", cache) for node, cache in zip("ab", caches, strict=True)]
    assert find_problems(reports) == []


def test_shared_memory_is_not_asked_for_without_workers():
    none = Place("/dev/shm", 0, "no such folder")
    assert find_problems([_with_place(node, "shm", none, num_workers=0) for node in "ab"]) == []
    assert _named(find_problems([_with_place(node, "shm", none) for node in "ab"])) == [(None, "not_writable")]


def test_limits_are_parameters():
    reports = [_report("a"), _report("b"), _with_place("c", "tmp", Place("/tmp", 2 * GIB))]
    assert find_problems(reports) == []
    assert _named(find_problems(reports, Limits(tmp=3 * GIB))) == [("c", "disk")]
    assert _named(find_problems(reports, Limits(run_dir=101 * GIB, cache=2 * GIB))) == [(None, "disk")] * 2


def test_of_two_nodes_that_differ_both_are_named():
    problems = find_problems([_report("a"), _report("b", code_hash="0dd")])
    assert _named(problems) == [("a", "code"), ("b", "code")]
    assert not any(problem.certain for problem in problems)
    assert "c0de on a, 0dd on b; no majority tells what is right" in problems[0].message


def test_of_two_nodes_the_one_that_lacks_a_path_is_certain():
    problems = find_problems([_report("a"), _with_path("b", "data.path", PathReport("/data/train.json", "missing"))])
    assert [(problem.node, problem.certain) for problem in problems] == [("b", True)]


def test_without_a_majority_of_many_nodes_none_is_named():
    problems = find_problems([_report(node, code_hash=value) for node, value in zip("abcd", "xxyy", strict=True)])
    assert _named(problems) == [(None, "code")]
    assert "x on a, b, y on c, d; no majority" in problems[0].message


def test_of_a_driver_only_the_branch_must_be_the_same():
    versions = ["550.54.14", "550.54.15", "550.90.07"]
    reports = [_report(node, versions={"cuda_driver": v}) for node, v in zip("abc", versions, strict=True)]
    assert find_problems(reports) == []
    reports[1] = _report("b", versions={"cuda_driver": "535.1.2"})
    assert _named(find_problems(reports)) == [("b", "versions")]


def test_two_processes_of_one_node_are_a_problem_of_the_settings():
    problems = find_problems([_report("a"), _report("a"), _report("b")])
    assert _named(problems) == [(None, "several_processes")]
    assert "2 processes ran on a, wanted 1" in problems[0].message


def test_an_error_on_every_node_is_said_once():
    problems = find_problems([NodeReport(node, error="ConfigError: no such recipe") for node in "abc"])
    assert _named(problems) == [(None, "failed")]


def test_a_thousand_nodes_take_no_time_and_every_odd_one_is_named():
    reports = [_report(f"node{number}") for number in range(1024)]
    reports[3] = _report("node3", code_hash="0dd", gpus=[])
    reports[700] = _with_path("node700", "data.path", PathReport("/data/train.json", "missing"))
    reports[1023] = _with_place("node1023", "tmp", Place("/tmp", 0, "No space left on device"))
    started = time.perf_counter()
    problems = find_problems(reports)
    assert time.perf_counter() - started < 2
    assert _named(problems) == [
        ("node3", "code"), ("node3", "gpus"), ("node700", "missing_path"), ("node1023", "not_writable"),
    ]
    assert "c0de on 1023 of 1024 nodes" in problems[0].message


def test_a_thousand_nodes_that_fail_are_one_line():
    problems = blame("disk", {f"node{number}": "full" for number in range(1024)}, 1024, "Free some.")
    names = ", ".join(f"node{number}" for number in range(8))
    assert problems == [Problem(None, "disk", f"full, on every node ({names} and 1016 more). Free some.")]


def test_half_of_the_nodes_is_no_majority():
    assert _named(compare("k", "it is", {"a": "x", "b": "x", "c": "y", "d": "z"}, "")) == [(None, "k")]
    assert _named(compare("k", "it is", {"a": "x", "b": "x", "c": "y"}, "")) == [("c", "k")]


def test_texts_for_people():
    assert name_some(["a", "b"]) == "a, b"
    assert (format_bytes(5 << 20), format_bytes(3 << 29)) == ("5 MiB", "1.5 GiB")
