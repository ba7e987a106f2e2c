"""The quickstart's pieces: the re-packed tower computes what DINOv2 computes; scenes and texts say what is there."""

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from llava_ds.errors import ConfigError
from llava_ds.models.vision_tower import build_tower
from llava_ds.quickstart import conversations as talk
from llava_ds.quickstart.concepts import load_concepts
from llava_ds.quickstart.report import choose_examples
from llava_ds.quickstart.scenes import PLACES, compose_scenes
from llava_ds.quickstart.sources import open_styles
from llava_ds.quickstart.tower import read_dino_weights, write_tower
from llava_ds.quickstart.views import draw_views


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    return open_styles(tmp_path_factory.mktemp("downloads"), 84, only="twemoji,openmoji")


def test_the_tower_computes_what_dinov2_computes(tmp_path):
    write_tower(tmp_path / "tower", 84)
    tower = build_tower(str(tmp_path / "tower"), None, -2)
    weights = {}
    for name, value in read_dino_weights().items():
        for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            name = name.replace(f"attention.attention.{old}.", f"attention.{new}.")
        weights[name.replace("attention.output.dense.", "attention.o_proj.")] = value
    classes, patches = weights.pop("position.class"), weights.pop("position.patches")
    weights["embeddings.position_embeddings"] = torch.cat([classes.view(1, 1, 384), patches.view(1, -1, 384)], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    dino = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    ).eval()
    dino.load_state_dict(weights)
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dino(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        got = tower(pixels)
    assert got.shape == (2, 36, 448)
    # The residual stream is centred (LayerNorm does not see the difference), and 64 channels are padding.
    expected = expected - expected.mean(-1, keepdim=True)
    # The identity before the first block costs digits: 1e4 stands beside values of size 1 (6e-4 was measured).
    torch.testing.assert_close(got[..., :384], expected, rtol=0, atol=2e-3)
    assert expected.std() > 0.4
    assert got[..., 384:].abs().max() < 1e-4


def test_the_concepts():
    concepts = load_concepts()
    assert len(concepts) == len({concept.name for concept in concepts}) == 288
    assert {concept.category for concept in concepts} == {"nature", "food"}
    assert sum(concept.category == "nature" for concept in concepts) == 153


def test_two_styles_from_pip_alone(styles):
    assert styles.trained == ["twemoji"]
    assert styles.unseen == "openmoji"
    assert set(styles.missing) == {"fluent", "noto"}
    drawn = [style.draw(concept) for style in styles.available.values() for concept in load_concepts()[:20]]
    assert len(drawn) == 40
    assert all(picture.size == (84, 84) and np.array(picture).std() > 5 for picture in drawn)


def test_one_style_is_not_enough(tmp_path):
    with pytest.raises(ConfigError, match="needs two drawing styles"):
        open_styles(tmp_path, 84, only="twemoji")
    with pytest.raises(ConfigError, match="unknown style"):
        open_styles(tmp_path, 84, only="twemoji,disney")


def test_scenes_hold_their_things_where_they_say(styles):
    concepts = load_concepts()
    scenes = compose_scenes(styles.available["twemoji"], concepts, 12, 84, seed=0)
    again = compose_scenes(styles.available["twemoji"], concepts, 12, 84, seed=0)
    assert [scene.things for scene in scenes] == [scene.things for scene in again]
    assert {len(scene.things) for scene in scenes} == {1, 2, 3, 4}
    for scene in scenes:
        pixels = np.array(scene.image)
        for thing in scene.things:
            left, top, right, bottom = (round(edge * 84) for edge in thing.box)
            assert pixels[top:bottom, left:right].std() > 5
            assert (left < 42) == ("left" in thing.place) and (top < 42) == ("top" in thing.place)
        for place in set(PLACES) - {thing.place for thing in scene.things}:
            x, y = (42 if "right" in place else 0), (42 if "bottom" in place else 0)
            assert (pixels[y : y + 42, x : x + 42] == 255).all()
        count, name, position = talk.scene_rounds(scene)
        assert count[1] == str(len(scene.things))
        assert any(thing.place in name[0] and thing.concept.name == name[1] for thing in scene.things)
        assert any(thing.concept.name in position[0] and thing.place == position[1] for thing in scene.things)


def test_records_are_llava_json_and_their_texts_hold_no_image():
    concept = load_concepts()[5]
    caption, chat = talk.caption_record(concept, "c", "x.png"), talk.picture_record(concept, "d", "x.png")
    assert [turn["from"] for turn in chat["conversations"]] == ["human", "gpt"] * 3
    assert all(str(record["conversations"]).count("<image>") == 1 for record in (caption, chat))
    words = talk.concept_words(concept, "d")
    text = talk.text_record(chat, words)
    assert "<image>" not in str(text) and "image" not in text
    assert text["conversations"][0]["value"].startswith(f"{words}\n")
    assert text["conversations"][1:] == chat["conversations"][1:]


def test_words_in_the_place_of_an_image_say_what_it_shows(styles):
    concepts = load_concepts()
    for concept in concepts:
        words = talk.concept_words(concept, concept.name).split()
        assert len(words) >= talk.NUM_DESCRIPTION_WORDS
        assert set(words) == set(f"{concept.name} {concept.subcategory} {concept.category}".split())
    assert talk.concept_words(concepts[0], "a") != talk.concept_words(concepts[0], "b")
    for scene in compose_scenes(styles.available["twemoji"], concepts, 12, 84, seed=0):
        phrases = talk.scene_words(scene).split(", ")
        assert sorted(phrases) == sorted(f"{thing.place} {thing.concept.name}" for thing in scene.things)


def test_views_are_different_pictures_of_one_size(styles):
    picture = styles.available["twemoji"].draw(load_concepts()[5])
    views = dict(draw_views(picture))
    assert views[""] is picture
    assert len(views) == 8
    assert all(view.size == picture.size and view.mode == "RGB" for view in views.values())
    assert len({view.tobytes() for view in views.values()}) == 8


def test_examples_are_taken_from_every_kind():
    records = [{"kind": kind, "number": number} for kind in ("a", "b") for number in range(10)]
    assert [record["number"] for record in choose_examples(records, 3)] == [0, 3, 6, 0, 3, 6]
