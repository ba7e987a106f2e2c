"""The mix is exact, and an image's kinds depend on the seed and its own id."""

from collections import Counter

import pytest

from llava_ds.datagen.plan import PAPER_MIX, parse_mix, plan_samples, share_out
from llava_ds.datagen.records import AnnotatedImage
from llava_ds.errors import ConfigError


def images(count: int, first: int = 0) -> list[AnnotatedImage]:
    return [AnnotatedImage(f"{n:012d}", f"{n}.jpg", ("x",), ()) for n in range(first, first + count)]


def counts(samples) -> dict[str, int]:
    return dict(Counter(sample.kind.name for sample in samples))


def test_shares():
    assert share_out(158, PAPER_MIX) == {"conversation": 58, "detail": 23, "complex": 77}
    assert share_out(158_000, PAPER_MIX) == {"conversation": 58_000, "detail": 23_000, "complex": 77_000}
    assert share_out(100, PAPER_MIX) == {"conversation": 37, "detail": 14, "complex": 49}  # 36.7, 14.56, 48.7
    assert share_out(2, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 0}
    assert share_out(7, {"a": 0, "b": 5}) == {"a": 0, "b": 7}


def test_a_larger_total_takes_nothing_away():
    counts = share_out(0, PAPER_MIX)
    for total in range(1, 2001):
        larger = share_out(total, PAPER_MIX)
        assert sorted(larger[name] - counts[name] for name in PAPER_MIX) == [0, 0, 1]
        assert all(abs(larger[name] - total * share / 158) < 1 for name, share in PAPER_MIX.items())
        counts = larger


def test_the_default_gives_every_image_the_largest_kind():
    assert counts(plan_samples(images(80), PAPER_MIX, None, 0)) == {"complex": 80, "conversation": 60, "detail": 24}
    assert counts(plan_samples(images(3), {"conversation": 1, "detail": 0}, None, 0)) == {"conversation": 3}


def test_samples_stand_in_the_order_of_images_and_once_each():
    samples = plan_samples(images(50), PAPER_MIX, 90, 1)
    assert len({sample.id for sample in samples}) == 90
    order = ["conversation", "detail", "complex"]
    keys = [(sample.image.id, order.index(sample.kind.name)) for sample in samples]
    assert keys == sorted(keys)
    assert samples[0].id == f"{samples[0].image.id}-{samples[0].kind.name}"


def test_choices_hang_on_seed_and_id_only():
    first = {s.id for s in plan_samples(images(50), PAPER_MIX, 40, 1)}
    assert {s.id for s in plan_samples(images(50)[::-1], PAPER_MIX, 40, 1)} == first
    assert {s.id for s in plan_samples(images(50), PAPER_MIX, 80, 1)} > first
    assert {s.id for s in plan_samples(images(50), PAPER_MIX, 40, 2)} != first


def test_more_than_there_are_images_for():
    assert len(plan_samples(images(77), PAPER_MIX, 158, 0)) == 158
    with pytest.raises(ConfigError, match="78 of complex, and there are 77 images.*at most 158"):
        plan_samples(images(77), PAPER_MIX, 160, 0)


@pytest.mark.parametrize("text", ["58:23", "0:0:0", "1:2:-3", "a:b:c", "1:2:3:4", "1.5:1:1", ""])
def test_bad_mixes(text):
    with pytest.raises(ConfigError, match="must be 3 whole numbers"):
        parse_mix(text)


def test_a_mix_with_a_kind_left_out():
    assert parse_mix("1:0:2") == {"conversation": 1, "detail": 0, "complex": 2}
    assert counts(plan_samples(images(10), parse_mix("1:0:2"), 9, 0)) == {"conversation": 3, "complex": 6}
