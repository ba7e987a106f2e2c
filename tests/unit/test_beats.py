"""Who hangs, from what the ranks said last."""

import time

import pytest

from llava_ds.distributed import Ranks
from llava_ds.engine.beats import Beat, find_hang
from llava_ds.engine.preemption import StopNotice
from llava_ds.engine.watchdog import Watchdog

WAITING = '  File "torch/distributed/distributed_c10d.py", line 1, in all_reduce\n'
BUSY = '  File "llava_ds/data/images.py", line 131, in _read\n'


def _beats(counts, still_s=100.0, stacks=None, phase="forward"):
    return [
        Beat(rank, f"node{rank}", count, phase, 7, still_s, (f"s{rank}",), stacks[rank] if stacks else "")
        for rank, count in enumerate(counts)
    ]


def _heard(beats, silent=()):
    return {beat.rank: 200.0 if beat.rank in silent else 1.0 for beat in beats}


def test_nobody_hangs_while_one_goes_on():
    beats = _beats([5, 5, 5])
    moving = [*beats[:2], Beat(2, "node2", 6, "forward", 7, 3.0)]
    assert find_hang(moving, _heard(moving), 60) is None
    assert find_hang(_beats([5, 5], still_s=59.0), _heard(beats[:2]), 60) is None


def test_the_rank_that_is_behind_hangs():
    beats = _beats([9, 8, 9])
    hang = find_hang(beats, _heard(beats), 60)
    assert hang.ranks == (1,)
    assert "rank 1 on node1 has not gone on for 100 s: step 7, forward, samples s1" in hang.message
    assert "The other 2 rank(s) wait: forward" in hang.message


def test_a_rank_without_a_sign_of_life_is_named_also_while_others_seem_to_go_on():
    beats = _beats([9, 9, 9], still_s=1.0)
    hang = find_hang(beats, _heard(beats, silent={2}), 60)
    assert hang.ranks == (2,) and "rank 2 on node2 has given no sign of life for 200 s" in hang.message


def test_in_the_same_place_the_one_that_does_not_wait_hangs():
    beats = _beats([9, 9, 9], stacks=[WAITING, BUSY, WAITING])
    hang = find_hang(beats, _heard(beats), 60)
    assert hang.ranks == (1,) and "images.py" in hang.message


def test_where_all_wait_for_each_other_none_is_named():
    for stacks in ([WAITING] * 2, [BUSY] * 2):
        beats = _beats([9, 9], stacks=stacks)
        hang = find_hang(beats, _heard(beats), 60)
        assert hang.ranks == () and "Look at the network" in hang.message


def test_of_a_thousand_ranks_the_first_are_told_and_the_others_counted():
    beats = _beats([8 if rank % 2 else 9 for rank in range(1024)])
    hang = find_hang(beats, _heard(beats), 60)
    assert len(hang.ranks) == 512 and hang.ranks[:3] == (1, 3, 5)
    assert hang.message.count("has not gone on") == 4 and "and 508 more ranks: 9, 11" in hang.message


def test_stacks_single_nobody_out_where_they_do_not_tell_who_waits():
    beats = _beats([9, 9, 9], stacks=[WAITING, BUSY, WAITING])
    assert find_hang(beats, _heard(beats), 60, by_stack=False).ranks == ()


def test_a_save_may_take_longer():
    beats = [*_beats([9, 9]), Beat(2, "node2", 8, "saving", 7, 100.0)]
    assert find_hang(beats, _heard(beats), 60) is None
    assert find_hang(beats, _heard(beats), 20).ranks == (2,)


class Ended(Exception):
    """In the place of the process's end."""


def _watchdog(phase: str, still_s: float) -> Watchdog:
    def leave(code):
        raise Ended(code)

    notice = StopNotice()
    notice.terminated_at = time.monotonic() - 60
    watchdog = Watchdog(Ranks(1, 1, 2), 900, notice, str, lambda *_: None, exit=leave)
    watchdog._now = (5, phase, 3, time.monotonic() - still_s, ())
    return watchdog


def test_a_rank_that_was_told_to_end_waits_for_others_for_seconds_only():
    with pytest.raises(Ended):
        _watchdog("backward", 30)._end_when_left_alone()
    _watchdog("backward", 5)._end_when_left_alone()  # it still goes on


def test_a_rank_that_was_told_to_end_is_not_interrupted_while_it_saves():
    _watchdog("saving before the end", 30)._end_when_left_alone()
