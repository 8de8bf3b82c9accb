"""Silent wrong answers that were found in the model, each with its kind: obeyed as the stock classes do, or refused in one line."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from accelerate import cpu_offload
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModel

from dynllava_plugin.errors import UserError
from tests.families.checkpoints import FAMILIES
from tests.families.ours import model_of
from tests.test_families import SIZES, batch_for
from tests.tiny_random import IMAGE_TOKEN, batch_of, random_model, random_sample

every_family = pytest.mark.parametrize("family", FAMILIES)
IMAGE = [IMAGE_TOKEN] * 16


def sample_with(ids, images=1, seed=0):
    sample = random_sample(random.Random(seed), images, 3)
    sample.ids = ids
    return sample


def first_distributions(model, batch, row=0):
    """log-probabilities of the first new token, in every way to get it."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    everything = torch.zeros_like(mask, dtype=torch.bool)
    for name, options in {
        "whole": {},
        "last": {"logits_to_keep": 1},
        "uncached": {"logits_to_keep": 1, "use_cache": False, "prompt_length": ids.shape[1]},
        "output_mask": {"logits_to_keep": 1, "output_mask": everything},
        "static": {"logits_to_keep": 1, "past_key_values": model.new_cache("static")},
    }.items():
        yield name, model(**batch, **options).logits[row, -1].log_softmax(-1)
    images = {"pixel_values": batch["pixel_values"]}
    scores = []
    for token in (7, 8):
        longer = torch.cat([ids, torch.full_like(ids[:, :1], token)], 1)
        labels = torch.full_like(longer, -100)
        labels[:, -1] = token
        mask_too = torch.cat([mask, mask[:, -1:]], 1)
        scores.append(model.score(longer, mask_too, labels=labels, **images)[row, -1])
    yield "score", torch.stack(scores)


@pytest.mark.parametrize("policy", ["image", "image_text", "divprune", "divprune,positions=original", "full"])
@torch.no_grad()
def test_a_prompt_that_ends_in_an_image_goes_on_from_the_last_token_that_stays(policy):
    model = random_model()
    model.set_sparsity(policy=policy)
    for seed in range(4):
        batch = batch_of([sample_with([1, 5, 6, *IMAGE], seed=seed)])
        found = dict(first_distributions(model, batch))
        for name, value in found.items():
            expected = found["whole"][[7, 8]] if name == "score" else found["whole"]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=f"{name}, image {seed}")
        right = {
            name: torch.nn.functional.pad(batch[name], (0, 2)) for name in ("input_ids", "attention_mask")
        }
        logits = model(**{**batch, **right}, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(logits, found["whole"], rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_chance_treats_an_image_alike_in_any_batch_and_dtype(family, dtype):
    model = copy.deepcopy(model_of(family)).to(dtype)
    model.set_sparsity(policy="random,keep=0.5")
    batch, alone, _ = batch_for(family, [[(56, 84)], [(28, 28), (84, 42)], [(42, 42)], [(56, 84)]])
    together = model(**batch, logits_to_keep=1).image_keep
    for row, sample in enumerate(alone):
        own = model(**sample, logits_to_keep=1).image_keep[0]
        assert torch.equal(together[row, : len(own)], own) and not together[row, len(own) :].any()
    # Not the same places of every image.
    width = min(int(row.sum()) for row in (batch["input_ids"] == model.config.image_token_id))
    assert not torch.equal(together[0, :width], together[1, :width])
    options = dict(do_sample=False, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    held = model.generate(**batch, **options, num_beams=2).past_key_values.kept_lengths()
    assert held.shape[1] == 8


@torch.no_grad()
def test_score_of_h2o_where_the_shorter_prompt_starts_with_its_image():
    model = random_model()
    model.set_sparsity(policy="h2o,r=0.5")
    samples = [sample_with([*IMAGE, 5]), sample_with([1, 5, 6, 7, 9, *IMAGE, 8], seed=1)]
    answers = [[11, 12, 13], [14, 15]]
    together = model.score(**batch_of(samples, labels=answers))
    for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        alone = model.score(**batch_of([sample], labels=[answer]))[0]
        torch.testing.assert_close(together[row][together[row] != 0], alone[alone != 0], rtol=1e-4, atol=1e-4)
        assert int((alone != 0).sum()) == len(answer)


def test_reentrant_checkpointing_is_refused_and_the_other_kind_trains():
    model = random_model().train()
    with pytest.raises(UserError, match=r"use_reentrant: .*leave it out"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable()
    batch = batch_of([random_sample(random.Random(0), 1, 3)], labels=[[5, 6, 7, 8, 9]])
    model(**batch).loss.backward()
    assert model.model.language_model.image_predictor.in_proj.weight.grad.abs().sum() > 0


@every_family
@torch.no_grad()
def test_embeddings_instead_of_ids_as_the_stock_class_takes_them(family):
    """Placeholders among embeddings are found; image features that can't be are refused where they should be pruned."""
    model = model_of(family)
    model.set_sparsity(policy="image,keep=0.4")
    batch, _, _ = batch_for(family, SIZES[:1])
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids, **batch)
    options = dict(do_sample=False, max_new_tokens=3)
    answer = model.generate(ids, **batch, **options)
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **batch, **options), answer)
    if family.startswith("qwen"):
        for call in (model, model.generate):
            with pytest.raises(UserError, match=r"inputs_embeds: .*input_ids"):
                call(inputs_embeds=embeds, **batch)
    else:
        alone = model.generate(inputs_embeds=embeds, **batch, **options)
        assert torch.equal(alone, answer[:, ids.shape[1] :])
        found = model(inputs_embeds=embeds, **batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.image_keep, expected.image_keep)
    mask = batch["attention_mask"]
    with pytest.raises(UserError, match=r"inputs_embeds: .*input_ids"):
        model(inputs_embeds=embeds, attention_mask=mask)
    with pytest.raises(UserError, match=r"inputs_embeds: .*input_ids"):
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2)
    model.set_sparsity(mode="full")
    model(inputs_embeds=embeds, attention_mask=mask)


@every_family
@torch.no_grad()
def test_logits_that_are_no_numbers_are_refused_by_the_checkpoints_name(family):
    model = model_of(family)
    model.config.name_or_path, before = "some/checkpoint", model.lm_head.weight[3].clone()
    batch, _, _ = batch_for(family, SIZES)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    message = "some/checkpoint: its logits are not finite"
    try:
        for value in (float("nan"), float("inf")):
            model.lm_head.weight[3] = value
            model.set_sparsity(policy="image,keep=0.4")
            for more in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
                with pytest.raises(UserError, match=message):
                    model.generate(**batch, max_new_tokens=2, **more)
            for policy in ("image,keep=0.4", "h2o"):
                model.set_sparsity(policy=policy)
                with pytest.raises(UserError, match=message):
                    model.score(**batch, labels=labels)
    finally:
        model.lm_head.weight[3] = before
        model.config.name_or_path = ""


@torch.no_grad()
def test_return_dict_and_the_vision_layer_are_obeyed():
    model = random_model(mode="image")
    batch = batch_of([random_sample(random.Random(0), 1, 3)], labels=[[5, 6, 7]])
    whole, as_tuple = model(**batch), model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], whole.loss)
    other = model(**batch, vision_feature_layer=-1)
    assert not torch.equal(other.image_hidden_states[0], whole.image_hidden_states[0])
    model.train()
    model.gumbel_tau = 1.0
    torch.manual_seed(0)
    assert isinstance(model(**batch, return_dict=False), tuple)


@torch.no_grad()
def test_what_a_config_asks_for_counts_as_an_argument():
    model = random_model(mode="image")
    batch = batch_of([random_sample(random.Random(0), 1, 3)])
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple) and model(**batch, return_dict=True).logits is not None
    for kind in ("dynamic", "static"):
        out = model(**batch, past_key_values=model.new_cache(kind), return_dict=True)
        assert isinstance(model(torch.tensor([[5]]), past_key_values=out.past_key_values), tuple), kind
    model.config.return_dict, model.config.output_hidden_states = True, True
    for call in (model, model.generate):
        with pytest.raises(UserError, match="output_hidden_states: layers hold different tokens"):
            call(**batch)
    assert model(**batch, output_hidden_states=False).logits is not None


@torch.no_grad()
def test_a_familys_own_image_arguments_are_obeyed_or_one_line():
    model = model_of("llava_onevision")
    model.set_sparsity(mode="full")
    batch, _, _ = batch_for("llava_onevision", [[(56, 84)]])
    assert "vision_aspect_ratio" in model.image_inputs
    with pytest.raises(
        UserError, match=r"input_ids: .* image tokens"
    ):  # fewer tiles than the prompt's places
        model(**batch, vision_aspect_ratio="anyres_max_1")
    llava = random_model()
    with pytest.raises(UserError, match="pixel_values: do not fit vision_feature_layer"):
        llava(**batch_of([random_sample(random.Random(0), 1, 3)]), vision_feature_layer=50)


def test_labels_that_leave_image_or_padding_tokens_in_are_refused():
    model = random_model().train()
    samples = [random_sample(random.Random(0), 1, 9), random_sample(random.Random(1), 1, 3)]
    batch = batch_of(samples, labels=[[5, 6], [7, 8]])
    for place in (batch["input_ids"] == IMAGE_TOKEN, batch["attention_mask"] == 0):
        labels = batch["labels"].where(~place, batch["input_ids"])
        row = int(place.any(1).nonzero()[0])
        with pytest.raises(
            UserError, match=f"labels: sample {row} of the batch has labels on image tokens or padding"
        ):
            model(**{**batch, "labels": labels})


@torch.no_grad()
def test_placeholders_are_masked_by_their_ids_after_the_vocabulary_grew():
    model = random_model(mode="full")
    model.config.placeholder_tokens, model.placeholders = 2, slice(94, 96)
    batch = batch_of([random_sample(random.Random(0), 1, 3)])
    before = model(**batch).logits
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
    after = model(**batch).logits
    lowest = torch.finfo(after.dtype).min
    assert (after[..., 94:96] == lowest).all() and (after[..., 96:] != lowest).all()
    torch.testing.assert_close(after[..., :96], before)


@torch.no_grad()
def test_an_offloaded_head_and_hooks_on_it():
    model = random_model()
    batch = batch_of([random_sample(random.Random(i), 1, 3) for i in range(3)])
    expected, seen = model(**batch, logits_to_keep=1).logits, []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(**batch, logits_to_keep=1)
    handle.remove()
    assert seen == [(3, 1, 96)]
    cpu_offload(model.lm_head, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, expected)


@every_family
def test_automodel_knows_every_family(family):
    model = model_of(family)
    assert type(AutoModel.from_config(model.config)) is model.model_class


@pytest.mark.parametrize("mode", ["full", "image"])
def test_prompt_tuning_trains_and_answers(mode):
    """peft hands embeddings down in place of ids: images find their places among them, and the prompt comes once."""
    model = random_model(mode=mode)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = batch_of([random_sample(random.Random(0), 1, 3)], labels=[[5, 6, 7]])
    tuned.train()
    tuned(**batch).loss.backward()
    prompt = next(p for name, p in tuned.named_parameters() if "prompt_encoder" in name)
    assert prompt.grad.abs().sum() > 0
    tuned.eval()
    batch.pop("labels")
    with torch.no_grad():
        if mode == "image":
            assert tuned(**batch).image_keep.sum() == 4
        cached, uncached = (
            tuned.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use)
            for use in (True, False)
        )
    assert cached.shape[1] == batch["input_ids"].shape[1] + 8
    assert cached.tolist() == uncached.tolist()
