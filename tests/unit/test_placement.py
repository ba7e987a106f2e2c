"""Image placement (paper, equation 4)."""

from llava_ds.schema import Sample, Turn
from llava_ds.text.placement import apply_placement

TURNS = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A fox."), Turn("user", "Sure?"),
         Turn("assistant", "Yes."))


def _first(sample_id: str, mode: str, epoch: int = 0, text: str = TURNS[0].text) -> str:
    sample = Sample(sample_id, ("a.png",), (Turn("user", text), *TURNS[1:]), "x")
    placed = apply_placement(sample, mode, seed=7, epoch=epoch)
    assert placed.turns[1:] == TURNS[1:]
    return placed.turns[0].text


def test_random_takes_both_orders_about_equally_often():
    texts = [_first(str(number), "random") for number in range(2000)]
    front, back = texts.count("<image>\nWhat is it?"), texts.count("What is it?\n<image>")
    assert front + back == 2000
    # Five standard deviations of a fair coin over 2000 tosses are 112.
    assert abs(front - back) < 2 * 112


def test_random_is_a_function_of_seed_epoch_and_id():
    assert [_first(str(n), "random", 3) for n in range(50)] == [_first(str(n), "random", 3) for n in range(50)]
    assert [_first(str(n), "random", 3) for n in range(50)] != [_first(str(n), "random", 4) for n in range(50)]


def test_front_and_as_data():
    assert _first("a", "front", text="What is it?\n<image>") == "<image>\nWhat is it?"
    assert _first("a", "as_data", text="What <image> is it?") == "What <image> is it?"
