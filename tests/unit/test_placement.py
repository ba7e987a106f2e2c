"""Image placement (paper, equation 4)."""

import numpy as np

from llava_ds.schema import Sample, Turn
from llava_ds.text.placement import apply_placement, is_image_first, sample_key

TURNS = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A fox."), Turn("user", "Sure?"),
         Turn("assistant", "Yes."))


PINNED = "0110110011111001000100010101001111000010000011000110010000110101"


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


def test_front_moves_the_images_of_every_question_and_random_of_the_first_only():
    turns = (Turn("assistant", "Hello."), Turn("user", "Q <image>"), Turn("assistant", "A"), Turn("user", "R\n<image>"))
    sample = Sample("a", ("x.png", "y.png"), turns, "x")
    assert [t.text for t in apply_placement(sample, "front", 7, 0).turns] == ["Hello.", "<image>\nQ", "A", "<image>\nR"]
    seen = {tuple(t.text for t in apply_placement(sample, "random", 7, epoch).turns) for epoch in range(20)}
    assert seen == {("Hello.", first, "A", "R\n<image>") for first in ("<image>\nQ", "Q\n<image>")}


def test_the_coin_is_the_same_on_every_machine():
    """Pinned: a resumed run must toss it again."""
    keys = np.array([sample_key(str(number)) for number in range(64)], dtype=np.uint64)
    tossed = is_image_first(7, np.arange(64), keys)
    assert "".join("01"[int(first)] for first in tossed) == PINNED
    assert [bool(is_image_first(7, epoch, key)) for epoch, key in enumerate(keys.tolist())] == tossed.tolist()


def test_front_and_as_data():
    assert _first("a", "front", text="What is it?\n<image>") == "<image>\nWhat is it?"
    assert _first("a", "as_data", text="What <image> is it?") == "What <image> is it?"
