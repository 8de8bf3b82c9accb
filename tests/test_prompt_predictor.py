"""The predictor for prompt text (Table 9): where the last question is, the rule by hand, training, the published layout."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynllava_plugin import load_model
from dynllava_plugin.cli import main as dynllava
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints import load_without_processor
from dynllava_plugin.model.token_layout import question_mask
from tests.golden_case import GOLDEN
from tests.test_equivalence import CLOSE, check_every_mode
from tests.tiny_random import IMAGE_TOKEN, Sample, batch_of, random_model
from tests.training_kit import processor, save_checkpoint, save_mixture
from train.finetune import main

USER, ASSISTANT = (81, 82), (83, 84, 82)
MARKS = (USER, ASSISTANT)


def talk(rng: random.Random, *rounds: int, images: int = 1) -> Sample:
    """A conversation whose questions have so many words, open for its last answer."""
    words = lambda count: [rng.randrange(3, 80) for _ in range(count)]  # noqa: E731
    ids = [1, *words(4)]
    for number, count in enumerate(rounds):
        picture = [IMAGE_TOKEN] * 16 * images if number == 0 else []
        answer = [*words(3), 2] if number < len(rounds) - 1 else []
        ids += [*USER, *picture, *words(count), *ASSISTANT, *answer]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return Sample(ids, torch.randn(images, 3, 28, 28, generator=generator))


def question_of(ids: list[int]) -> list[int]:
    """The published rule in words: behind the last image or "USER:" that follows it, up to the last "ASSISTANT:"."""
    text = [str(token) for token in ids]
    end = max(i for i in range(len(ids)) if tuple(ids[i : i + 3]) == ASSISTANT)
    start = max((i + 2 for i in range(end) if tuple(ids[i : i + 2]) == USER), default=0)
    start = max([start, *(i + 1 for i in range(end) if text[i] == str(IMAGE_TOKEN))])
    return list(range(start, end))


def test_where_the_last_question_is():
    rng = random.Random(0)
    samples = [talk(rng, 5), talk(rng, 4, 6), talk(rng, 0, images=2), talk(rng, 3, 2, 7, images=0)]
    for left in (True, False):
        answers = [
            [5, *ASSISTANT, 6],
            [7, 8],
            [9],
            [*USER, 5],
        ]  # an answer's own words are none of the prompt's
        batch = batch_of(samples, left=left, labels=answers)
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        found = question_mask(ids, valid, ids == IMAGE_TOKEN, batch["labels"] != -100, MARKS)
        for row, sample in enumerate(samples):
            shift = int(valid[row].int().argmax())
            assert found[row].nonzero()[:, 0].tolist() == [shift + i for i in question_of(sample.ids)]
    nothing = torch.tensor([[1, 5, 6]])
    assert not question_mask(nothing, nothing > 0, nothing < 0, None, MARKS).any()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = random_model(prompt_predictor=True, prompt_keep_rate=0.7, question_marks=MARKS)
    predictor, seen = made._llm.prompt_predictor, []
    hook = predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))
    rng = random.Random(9)
    with torch.no_grad():
        made(**batch_of([talk(rng, 40) for _ in range(4)]))
        hook.remove()
        predictor.head[-1].bias[1] += (seen[0][..., 0] - seen[0][..., 1]).median()
    return made


@torch.no_grad()
def test_the_rule_by_hand(model):
    """Later layers over all tokens; a question's dropped tokens are masked, save its last one; positions stay."""
    llm, rng, dropped_any = model._llm, random.Random(1), 0
    for sample in (talk(rng, 12), talk(rng, 5, 9), talk(rng, 6, images=2)):
        ids = torch.tensor([sample.ids])
        images = {"pixel_values": sample.images}
        embeds = model._embed(llm.policy, images, ids, output=(None, 0))[0].hidden
        rotary = llm.rotary_emb(embeds, position_ids=torch.arange(ids.shape[1])[None])
        out, gone = model(**batch_of([sample])), set()
        question = question_of(sample.ids)
        for number, layer in enumerate(llm.layers):
            if number == 2:
                logits = llm.prompt_predictor(embeds[0])
                gone = {i for i in question[:-1] if logits[i, 1] >= logits[i, 0]}
                places = [i for i, token in enumerate(sample.ids) if token == IMAGE_TOKEN]
                gone |= {i for i, keep in zip(places, out.image_keep[0].tolist(), strict=True) if not keep}
            mask = [
                [k <= q and (k == q or k not in gone) for k in range(ids.shape[1])]
                for q in range(ids.shape[1])
            ]
            embeds = layer(embeds, attention_mask=torch.tensor(mask)[None, None], position_embeddings=rotary)
        expected = model._logits(llm.norm(embeds))[0, -1]
        torch.testing.assert_close(out.logits[0, -1], expected, **CLOSE)
        assert out.token_index[0].tolist() == [i for i in range(ids.shape[1]) if i not in gone]
        dropped_any += len(gone & set(question))
    assert dropped_any > 3


def test_every_mode_agrees(model, monkeypatch):
    rng = random.Random(4)
    samples = [talk(rng, 8), talk(rng, 3, 10, images=2)]
    monkeypatch.setattr("tests.test_equivalence.make_samples", lambda drawn: (rng, samples))
    check_every_mode(model, None)
    arguments = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)
    cached = model.generate(**batch_of(samples), **arguments)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(cached, model.generate(**batch_of(samples), **arguments, **other)), other


def test_turned_off_it_is_the_method_and_what_it_cannot_do_is_said(model):
    batch = batch_of([talk(random.Random(5), 8)])
    with torch.no_grad():
        kept = model(**batch, use_cache=True)
        model.set_sparsity(prompt_keep_rate=1.0)
        assert model(**batch).logits.shape[1] > kept.logits.shape[1]
        model.set_sparsity(prompt_keep_rate=0.7)
        more = torch.cat([batch["attention_mask"], torch.ones(1, 3).long()], 1)
        with pytest.raises(UserError, match="goes on behind a cache"):
            model(torch.tensor([[5, 6, 7]]), attention_mask=more, past_key_values=kept.past_key_values)
    with pytest.raises(UserError, match="needs a predictor for prompt text"):
        random_model(prompt_keep_rate=0.7)


def test_training_pulls_on_questions_that_are_long_enough(model):
    rng = random.Random(6)
    batch = batch_of([talk(rng, 12), talk(rng, 5)], left=False, labels=[[5, 6, 7, 8, 9], [5, 6]])
    noise = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0))
    model.train()
    try:
        seen = []
        hook = model._llm.prompt_predictor.register_forward_hook(
            lambda module, given, output: seen.append(output)
        )
        out = model(**batch, gumbel_noise=(None, None, noise))
        hook.remove()
        mask = (seen[0][:12] + noise[0])[:, 0] > (seen[0][:12] + noise[0])[:, 1]
        assert torch.equal(out.prompt_keep[0], mask) and out.prompt_keep[1, :5].all()  # 5 < min_prompt_length
        torch.testing.assert_close(out.prompt_keep_loss, (0.7 - mask.float().mean()) ** 2 / 2)
        parts = out.image_keep_loss + out.text_keep_loss + out.prompt_keep_loss
        torch.testing.assert_close(out.loss, out.lm_loss + 100 * parts)
        out.loss.backward()
        assert model._llm.prompt_predictor.in_proj.weight.grad.abs().sum() > 0
    finally:
        model.eval()


def test_it_trains_saves_loads_and_goes_through_the_published_layout(tmp_path):
    mixture, images = save_mixture(tmp_path / "data")
    flags = ["--model_name_or_path", str(save_checkpoint(tmp_path / "start")), "--data_path", str(mixture)]
    flags += [
        "--image_folder",
        str(images),
        "--data_cache",
        str(tmp_path / "cache"),
        "--use_cpu",
        "--report_to",
        "none",
    ]
    flags += [
        "--dataloader_num_workers",
        "0",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
        "--max_steps",
        "2",
    ]
    flags += ["--global_batch_size", "4", "--per_device_train_batch_size", "4", "--warmup_steps", "0"]
    out = tmp_path / "out"
    assert (
        main([*flags, "--prompt_keep_rate", "0.7", "--min_prompt_length", "3", "--output_dir", str(out)]) == 0
    )
    assert "prompt_keep_rate" in (out / "train_log.csv").read_text().splitlines()[0]
    trained, _ = load_model(out, device="cpu")
    assert trained.config.sparsity.prompt_keep_rate == 0.7 and trained._llm.policy.prompt is not None
    user, assistant = trained.config.sparsity.question_marks
    text = "A USER: <image>\nwhat is there ASSISTANT: a</s>USER: is it red ASSISTANT:"
    ids = processor().tokenizer(text)["input_ids"]
    for mark in (user, assistant):
        assert sum(tuple(ids[i : i + len(mark)]) == mark for i in range(len(ids))) == 2
    weights = load_file(out / "model.safetensors")
    names = [name for name in weights if "prompt_predictor" in name]
    assert names and all(torch.equal(weights[name], trained.state_dict()[name]) for name in names)
    assert dynllava(["convert", str(out), str(tmp_path / "published"), "--to", "published"]) == 0
    config = json.loads((tmp_path / "published" / "config.json").read_text())["sparse_config"]
    assert config["use_instruct_predictor"] and config["instruct_keep_rate"] == 0.7
    again = load_without_processor(tmp_path / "published")
    assert all(torch.equal(weights[name], again.state_dict()[name]) for name in names)
    assert again._llm.policy.prompt is not None


def test_a_published_checkpoints_own_is_loaded_and_used(tmp_path):
    """Its names, its settings; where its config leaves it off, it stays off."""
    folder = tmp_path / "published"
    shutil.copytree(GOLDEN / "mha", folder)
    path = folder / "checkpoint" / "model.safetensors"
    weights = load_file(path)
    own = {name: x for name, x in weights.items() if name.startswith("model.output_text_score_predictor.")}
    weights |= {name.replace("output_text", "instruct"): x + 0.25 for name, x in own.items()}
    save_file(weights, path)
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert load_without_processor(folder / "checkpoint")._llm.prompt_predictor is None
    config["sparse_config"] |= {
        "use_instruct_predictor": True,
        "instruct_keep_rate": 0.7,
        "instruct_len_for_training": 4,
    }
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    model = load_without_processor(folder / "checkpoint")
    assert model.config.sparsity.min_prompt_length == 4 and model._llm.policy.prompt is not None
    states = torch.randn(3, model.config.text_config.hidden_size)
    bias = model._llm.text_predictor.state_dict()
    for name, tensor in model._llm.prompt_predictor.state_dict().items():
        torch.testing.assert_close(tensor, bias[name] + 0.25)
    assert model._llm.prompt_predictor(states).shape == (3, 2)
