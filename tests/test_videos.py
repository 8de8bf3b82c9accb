"""Videos: an image of many tokens to every policy. What is drawn in `test_families` and `test_matrix` has some, too."""

from __future__ import annotations

import math

import pytest
import torch

from dynllava_plugin.errors import UserError
from tests.families.oracle import hidden_at, last_row_attention, oracle_logits, with_tokens
from tests.families.ours import answers_of, model_of, stock_of
from tests.test_families import (
    CLOSE,
    TILED_VIDEOS,
    VIDEOS,
    assert_full_context_is_the_stock_class,
    batch_for,
    step_by_step,
)

# A video behind an image and before one, two videos, an image alone, nothing.
SIZES = [[(56, 28), (56, 84, 4), (28, 28)], [(28, 56, 4), (42, 84, 4)], [(84, 42)], []]
every_family = pytest.mark.parametrize("family", sorted(VIDEOS))


def lengths_of(model, sample, sizes):
    """How many tokens each image and video has, as the processor put them into the prompt."""
    ids = sample["input_ids"][0]
    found = []
    for kind, token in (("image", model.config.image_token_id), ("video", model.config.video_token_id)):
        grid = sample.get(f"{kind}_grid_thw")
        if grid is not None:
            found.append([int(one) // 4 for one in grid.prod(-1)])
        else:  # OneVision: neighbours touch, all videos here are of 4 frames
            count, total = (
                sum((len(size) == 3) == (kind == "video") for size in sizes),
                int((ids == token).sum()),
            )
            found.append([total // count] * count if kind == "video" and count else [])
    return found


@pytest.mark.parametrize("family", sorted(VIDEOS | TILED_VIDEOS))
@torch.no_grad()
def test_full_context_is_the_stock_class(family):
    assert_full_context_is_the_stock_class(family, SIZES)
    model, (batch, alone, _) = model_of(family), batch_for(family, SIZES)
    model.set_sparsity(mode="full")
    if family in VIDEOS:
        assert (batch["input_ids"] == model.config.video_token_id).sum() > 40
    with_embeds = {**alone[0], "inputs_embeds": model.get_input_embeddings()(alone[0]["input_ids"])}
    if "qwen" not in family:  # elsewhere positions are made of ids
        with_embeds.pop("input_ids")
        torch.testing.assert_close(
            model(**with_embeds).logits, stock_of(family)(**alone[0]).logits, rtol=1e-5, atol=1e-5
        )


@every_family
@pytest.mark.parametrize(
    "text", ["image_text,keep=0.4", "fastv,k=2,keep=0.3", "divprune,keep=0.4,positions=original"]
)
@torch.no_grad()
def test_cached_decoding_is_what_the_masking_oracle_says(family, text):
    model, stock, steps = model_of(family), stock_of(family), 4
    model.set_sparsity(policy=text)
    batch, alone, _ = batch_for(family, SIZES)
    answers = answers_of(family, len(SIZES), steps, 3)
    together, cache = step_by_step(model, batch, answers)
    decided = model(**batch, logits_to_keep=1).image_keep
    for row, sample in enumerate(alone):
        ids = sample["input_ids"][0]
        keep = torch.ones(len(ids) + steps - 1, dtype=torch.bool)
        places = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
        keep[: len(ids)][places] = decided[row, : int(places.sum())]
        keep[len(ids) :] = cache.output_keep()[row]
        assert places.any() == (not keep[: len(ids)].all())
        longer = with_tokens(sample, answers[row, :-1].tolist())
        expected = oracle_logits(stock, longer, model._llm.policy.layers[0], keep)[len(ids) - 1 :]
        torch.testing.assert_close(together[row], expected, **CLOSE)


@every_family
@torch.no_grad()
def test_a_share_of_each_video_stays_over_all_its_frames(family):
    """floor(r * N) of a video, ranked by the predictor and by attention as computed from the stock model."""
    model, stock = model_of(family), stock_of(family)
    for sizes in ([(56, 84, 4)], [(28, 56, 4), (42, 84, 4)]):
        sample = batch_for(family, [sizes])[1][0]
        places = (sample["input_ids"][0] == model.config.video_token_id).nonzero()[:, 0]
        videos = places.split(lengths_of(model, sample, sizes)[1])
        assert len(videos) == len(sizes) and all(len(video) > 8 for video in videos)
        hidden, rows = hidden_at(stock, sample, 2), last_row_attention(stock, sample, 1).mean(0)
        scores = {"image,keep=0.4": [], "fastv,k=2,keep=0.3": []}
        for video in videos:
            logits = model._llm.image_predictor(hidden[video][None])[0]
            scores["image,keep=0.4"].append(logits[:, 0] - logits[:, 1])
            scores["fastv,k=2,keep=0.3"].append(rows[video])
        for text, ranked in scores.items():
            model.set_sparsity(policy=text)
            expected = []
            for score in ranked:
                stays = torch.zeros(len(score), dtype=torch.bool)
                stays[score.topk(math.floor(float(text.rpartition("=")[2]) * len(score))).indices] = True
                expected.append(stays)
            assert torch.equal(model(**sample, logits_to_keep=1).image_keep[0], torch.cat(expected)), text


@every_family
@torch.no_grad()
def test_chance_is_a_videos_own(family):
    """The same tokens of a video in a batch and alone, others of another video."""
    model = model_of(family)
    model.set_sparsity(policy="random,keep=0.5")
    sizes = [[(56, 84, 4)], [(56, 84, 4), (28, 28)]]
    batch, alone, _ = batch_for(family, sizes)
    together = model(**batch, logits_to_keep=1).image_keep
    for row, sample in enumerate(alone):
        own = model(**sample, logits_to_keep=1).image_keep[0]
        assert torch.equal(together[row, : len(own)], own)
    video = int((alone[0]["input_ids"] == model.config.video_token_id).sum())
    assert together[0, :video].sum() == video // 2 and not torch.equal(
        together[0, :video], together[1, :video]
    )


@every_family
def test_a_video_trains_the_predictor(family):
    model = model_of(family)
    model.set_sparsity(mode="image_text", vision_keep_rate=0.4)
    sample = batch_for(family, [[(56, 84, 4)]])[1][0]
    longer = with_tokens(sample, answers_of(family, 1, 6, 1)[0].tolist())
    labels = torch.full_like(longer["input_ids"], -100)
    labels[:, -6:] = longer["input_ids"][:, -6:]
    model.train()
    try:
        out = model(**longer, labels=labels)
        out.loss.backward()
        gradient = model._llm.image_predictor.head[-1].weight.grad
        assert out.image_keep.shape[1] == int((longer["input_ids"] == model.config.video_token_id).sum())
        assert gradient.abs().max() > 0 and out.loss.isfinite()
        with pytest.raises(UserError, match="labels: sample 0 of the batch has labels on image tokens"):
            model(**longer, labels=longer["input_ids"])
    finally:
        model.zero_grad()
        model.eval()


@every_family
def test_videos_that_are_not_in_their_places_are_one_line(family):
    model = model_of(family)
    model.set_sparsity(mode="image_text")
    batch = batch_for(family, SIZES)[0]
    video = model.config.video_token_id
    without = {name: value for name, value in batch.items() if name != "pixel_values_videos"}
    with pytest.raises(UserError, match="image tokens"):
        model(**without)
    row, column = (batch["input_ids"] == video).nonzero()[0].tolist()
    swapped = {**batch, "input_ids": batch["input_ids"].clone()}
    swapped["input_ids"][row, column] = model.config.image_token_id
    with pytest.raises(
        UserError, match=r"image and video tokens are not those of 3 images and 3 videos; give each"
    ):
        model(**swapped)
    if "video_grid_thw" in batch:
        without = {name: value for name, value in batch.items() if name != "video_grid_thw"}
        with pytest.raises(UserError, match="video_grid_thw: missing"):
            model(**without)
        encoded = {kind: model.encode(kind, batch) for kind in ("image", "video")}
        names = {"pixel_values", "pixel_values_videos", "video_grid_thw"}
        given = {name: value for name, value in batch.items() if name not in names}
        with pytest.raises(UserError, match=r"video_grid_thw: not those of"):
            model.generate(**given, mm_encoder_outputs=encoded, max_new_tokens=1)
    with pytest.raises(UserError, match="mm_encoder_outputs has these videos' features already"):
        encoded = {"video": model.encode("video", batch)}
        model.generate(**batch, mm_encoder_outputs=encoded, max_new_tokens=1)
