"""The tiny LLaVA's training script: where its gaze loss points, and a few steps of it."""

from __future__ import annotations

import torch
from transformers import CLIPVisionModel

from dynllava_plugin.easy_vqa.facts import load_tiles
from train.tiny_llava.batches import Encoder, training_batches
from train.tiny_llava.gaze import FIND, MATCH, found, matching
from train.tiny_llava.language import align_projector, build_model, train_language
from train.tiny_llava.recipes import EASY
from train.tiny_llava.tokenizer import build_tokenizer
from train.tiny_llava.train import main
from train.tiny_llava.vision import TileSet, patch_labels, vision_config

SCENE = [("red", "circle"), ("blue", "triangle"), ("red", "triangle"), ("teal", "circle")]


def test_what_a_question_is_about():
    assert found("what color is the shape in the top right?", SCENE) == {1}
    assert found("is there a teal shape in the bottom left?", SCENE) == {2}
    assert matching("is there a teal shape in the bottom left?", SCENE) == set()
    assert matching("is there a red triangle in the image?", SCENE) == {2}
    assert matching("is there a blue circle in the image?", SCENE) == set()
    assert matching("is there not a red shape?", [("red", "circle")]) == {0}


def test_gaze_points_at_the_objects_patches_and_training_follows_it():
    tiles = load_tiles("train")[:60]
    tokenizer, tile_set = build_tokenizer(tiles), TileSet(tiles)
    batch = next(training_batches(tile_set, tokenizer, 3, 2, 6, seed=0))
    assert [gaze.heads for gaze in batch.gaze] == [FIND, MATCH]
    for gaze in batch.gaze:
        torch.testing.assert_close(gaze.goals.sum(1), torch.ones(len(gaze.rows)))
        assert (batch.labels[gaze.rows, gaze.columns] == -100).all()
        assert (batch.labels[gaze.rows, gaze.columns + 1] != -100).all()
    torch.manual_seed(0)
    model = build_model(CLIPVisionModel(vision_config()).eval(), tokenizer, 4, 128)
    align_projector(model, EASY.alignment(tile_set, 0), tokenizer, steps=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    saved = []
    train_language(
        model, training_batches(tile_set, tokenizer, 2, 1, 4, seed=0), 2,
        checkpoint=lambda model, step: saved.append(step), checkpoint_every=1,
    )  # fmt: skip
    assert saved == [1, 2]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "lm_head.weight" in moved and not any("vision_tower" in name for name in moved)


def test_the_prompt_for_short_answers_is_left_out_of_most_training_questions():
    tokenizer = build_tokenizer(load_tiles("train")[:60])
    turns = [("what color is the shape?", "red")] * 200
    always, seldom = (len(Encoder(tokenizer, share)(turns, True)[0]) for share in (1.0, 0.25))
    assert 0.5 < seldom / always < 0.8


def test_a_folder_that_holds_something_is_not_replaced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --output_dir {tmp_path} is not empty")
    assert (tmp_path / "notes.txt").exists()


def test_an_objects_patches_are_those_that_show_most_of_it():
    owner = torch.zeros(2, 128, 128, dtype=torch.int64)
    owner[0, 0:16, 8:32] = 5  # half of patch 0, all of patch 1
    owner[0, 127, 127] = 6  # a single pixel is still an object
    owner[1, 16:32, 4:32] = 5  # 75% of patch 8, all of patch 9
    labels = patch_labels(owner)

    assert [(p, int(labels[0, p])) for p in range(64) if labels[0, p] >= 0] == [(1, 4), (63, 5)]
    assert [(p, int(labels[1, p])) for p in range(64) if labels[1, p] >= 0] == [(8, 4), (9, 4)]
