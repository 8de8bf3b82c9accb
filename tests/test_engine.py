"""The engine: batching changes nothing, tokens are counted right, bad requests are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine import engine as engine_module
from dynllava_plugin.evaluation.engine.answers import Answer, mean_counts
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.prompting import VICUNA
from dynllava_plugin.evaluation.engine.requests import Generation, Request
from dynllava_plugin.evaluation.llava_json import Sample
from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.settings import AUTO, ModelSettings
from dynllava_plugin.images import open_image
from dynllava_plugin.model.static_prefill import prefill_bytes
from train.data import open_images
from train.skipped import UnusableSample

SHORT = Generation.from_task({"max_new_tokens": 12})


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine.load(ModelSettings("tiny", device="cpu"), batch_size=8)


def ask(question: str, images: tuple = (), name: str = "sample", continuation: str = "") -> Request:
    prompt = VICUNA.prompt([(question, None)], len(images), name)
    return Request(prompt, tuple(images), name, continuation)


@pytest.fixture
def requests(easy_vqa_data: Path) -> list[Request]:
    """One image, none, two; short and long questions."""
    rows = easy_vqa.load_rows("easy_vqa")[:5]
    mixed = [ask(easy_vqa.question_text("easy_vqa", row["question"]), (row["image"],)) for row in rows]
    mixed.append(ask("What color is grass?"))
    mixed.append(ask("Do both images show the same shape?", (rows[0]["image"], rows[1]["image"])))
    scene = easy_vqa.load_rows("easy_vqa_describe")[0]
    return [*mixed, ask(scene["question"], (scene["image"],))]


@pytest.mark.parametrize("mode", ["full", "image", "image_text"])
def test_batched_answers_equal_single_answers(engine: Engine, requests: list[Request], mode: str) -> None:
    engine.model.set_sparsity(mode=mode)
    batched = engine.generate(requests, SHORT)
    single = [engine.generate([request], SHORT)[0] for request in requests]
    assert batched == single


@pytest.mark.parametrize("mode", ["full", "image", "image_text"])
def test_questions_about_one_image_share_its_prefill(
    engine: Engine, easy_vqa_data: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same answers, tokens and costs as one at a time; two images are told apart however few pixels differ."""
    engine.model.set_sparsity(mode=mode)
    rows = easy_vqa.load_rows("easy_vqa")[:9]
    picture = Image.open(rows[0]["image"]).convert("RGB")
    touched = picture.copy()
    touched.paste((0, 0, 0), (0, 0, 8, 8))
    asked = [(row["question"], row["image"]) for row in rows]
    asked += [(question, image) for question, _ in asked[:3] for image in (picture, touched)]
    requests = [ask(easy_vqa.question_text("easy_vqa", question), (image,)) for question, image in asked]
    before = engine.calls.shared_prompts
    monkeypatch.setattr(engine, "batch_size", 1)
    single = engine.generate(requests, SHORT)
    assert engine.calls.shared_prompts == before
    monkeypatch.setattr(engine, "batch_size", 8)
    assert engine.generate(requests, SHORT) == single
    distinct = len({row["image"] for row in rows}) + 1
    assert engine.calls.shared_prompts >= before + len(requests) - 2 * distinct


def test_what_is_to_be_scored_is_no_part_of_what_is_asked(engine: Engine, requests: list[Request]) -> None:
    engine.model.set_sparsity(mode="image_text")
    with_answer = [replace(request, continuation=" zebra in the rain") for request in requests]
    assert engine.generate(with_answer, SHORT) == engine.generate(requests, SHORT)


@pytest.mark.parametrize(
    "own",
    [
        {"use_cache": False},
        {"num_beams": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"num_return_sequences": 1},
    ],
    ids=str,
)
def test_a_checkpoints_own_generation_settings(
    engine: Engine, requests: list[Request], own: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they make impossible isn't shared; batch and single agree."""
    engine.model.set_sparsity(mode="image_text")
    for name, value in own.items():
        monkeypatch.setattr(engine.model.generation_config, name, value)
    alike = [request for request in requests[:5] for _ in range(2)]
    before = engine.calls.shared_prompts
    batched = engine.generate(alike, SHORT)
    assert (engine.calls.shared_prompts > before) == (own == {"num_return_sequences": 1})
    single = [engine.generate([request], SHORT)[0] for request in alike]
    assert [answer.text for answer in batched] == [answer.text for answer in single]


def test_counts(engine: Engine, requests: list[Request]) -> None:
    engine.model.set_sparsity(mode="full", vision_keep_rate=0.2)
    full = engine.generate(requests, SHORT)
    engine.model.set_sparsity(mode="image_text", vision_keep_rate=0.2)
    sparse = engine.generate(requests, SHORT)
    per_image = full[0].image_tokens
    assert [answer.image_tokens for answer in sparse] == [per_image] * 5 + [0, 2 * per_image, per_image]
    assert [answer.kept_image_tokens for answer in full] == [answer.image_tokens for answer in full]
    kept = int(0.2 * per_image)
    assert [answer.kept_image_tokens for answer in sparse] == [kept] * 5 + [0, 2 * kept, kept]
    for answer in full:
        assert answer.kept_tokens == answer.cached_tokens == answer.generated_tokens - 1
    assert all(0 <= answer.kept_tokens <= answer.cached_tokens for answer in sparse)
    assert all(answer.generated_tokens <= 12 for answer in sparse)


def test_counts_of_named_policies(engine: Engine, requests: list[Request]) -> None:
    """A mode and the policy of its name cost the same; where the cache lets tokens go, what came in is counted."""
    engine.model.set_sparsity(mode="image_text", policy=None, policy_args={}, vision_keep_rate=0.2)
    by_mode = engine.generate(requests[:2], SHORT)
    engine.model.set_sparsity(policy="image_text")
    assert engine.generate(requests[:2], SHORT) == by_mode and by_mode[0].cost is not None
    engine.model.set_sparsity(policy="h2o", r=0.1)
    (let_go,) = engine.generate(requests[:1], SHORT)
    assert (
        let_go.kept_image_tokens == let_go.image_tokens and let_go.kept_tokens is None and let_go.cost is None
    )
    engine.model.set_sparsity(policy="fastv+h2o,keep=0.5,h2o.r=0.1")
    (both,) = engine.generate(requests[:1], SHORT)
    assert both.kept_image_tokens == both.image_tokens // 2
    engine.model.set_sparsity(policy=None, policy_args={})


def test_beams_have_no_single_history(engine: Engine, requests: list[Request]) -> None:
    answer = engine.generate(requests[:1], Generation.from_task({"max_new_tokens": 4, "num_beams": 2}))[0]
    assert answer.kept_tokens is None and answer.kept_image_tokens is None


def test_until_ends_the_answer(engine: Engine, requests: list[Request]) -> None:
    engine.model.set_sparsity(mode="full")
    long = Generation.from_task({"max_new_tokens": 24})
    whole = engine.generate(requests[-1:], long)[0].text
    stop = whole[3:5]
    cut = engine.generate(requests[-1:], Generation(long.kwargs, (stop, "never")))[0].text
    assert cut == whole[: whole.find(stop)].strip()


@pytest.mark.parametrize("mode", ["full", "image_text"])
def test_score_agrees_with_generation(engine: Engine, easy_vqa_data: Path, mode: str) -> None:
    engine.model.set_sparsity(mode=mode)
    rows = easy_vqa.load_rows("easy_vqa")[:4]
    questions = [(easy_vqa.question_text("easy_vqa", row["question"]), (row["image"],)) for row in rows]
    answers = [answer.text for answer in engine.generate([ask(*question) for question in questions], SHORT)]
    own = [ask(*question, continuation=f" {text}") for question, text in zip(questions, answers, strict=True)]
    other = [ask(*question, continuation=" zebra in the rain") for question in questions]
    greedy, not_greedy = engine.score(own), engine.score(other)
    assert all(score.is_greedy for score in greedy)
    assert not any(score.is_greedy for score in not_greedy)
    assert all(a.loss < b.loss for a, b in zip(greedy, not_greedy, strict=True))
    alone = [engine.score([request])[0] for request in [*own, *other]]
    assert [s.tokens for s in alone] == [s.tokens for s in [*greedy, *not_greedy]]
    together = [s.logprob for s in [*greedy, *not_greedy]]
    assert [s.logprob for s in alone] == pytest.approx(together, abs=1e-4)


def test_generation_arguments() -> None:
    default = Generation.from_task(None)
    assert default.kwargs == {"do_sample": False, "max_new_tokens": 1024} and default.until == ()
    task = {"until": ["\n\n", ""], "temperature": 0.7, "image_aspect_ratio": "pad", "max_gen_toks": 5}
    assert Generation.from_task(task) == Generation({"do_sample": False, "max_new_tokens": 5}, ("\n\n",))
    assert Generation.from_task({"do_sample": True, "temperature": 0}).kwargs["do_sample"] is False
    sampled = Generation.from_task({"do_sample": True, "temperature": 0.5, "top_p": None}).kwargs
    assert sampled == {"do_sample": True, "temperature": 0.5, "max_new_tokens": 1024}


def test_bad_requests_are_named(engine: Engine, easy_vqa_data: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="row 7: the question is empty"):
        ask("<image>\n ", (image,), "row 7")
    with pytest.raises(UserError, match="row 7: the question has 2 <image> but 1 images"):
        ask("<image> or <image>?", (image,), "row 7")
    with pytest.raises(UserError, match="row 7: the prompt has 0 <image> but 1 images"):
        engine.generate([Request("USER: what? ASSISTANT:", (image,), "row 7")])
    with pytest.raises(UserError, match=r"row 7: .*empty"):
        engine.score([ask("What?", name="row 7")])
    with pytest.raises(UserError, match="batch_size"):
        Engine(engine.model, engine.processor, 0)
    missing = tmp_path / "missing.png"
    with pytest.raises(UserError, match=r"row 7: image .*missing\.png doesn't exist"):
        engine.generate([ask("What?", (str(missing),), "row 7")])


@pytest.mark.parametrize("lenient", [False, True])
def test_bad_images_are_named(tmp_path: Path, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # lmms-eval switches it on
    truncated, corrupt = tmp_path / "truncated.png", tmp_path / "corrupt.png"
    Image.effect_noise((64, 64), 90).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:600])
    corrupt.write_text("no image")
    for path, problem in (
        (truncated, "truncated"),
        (corrupt, "isn't an image"),
        (tmp_path, "doesn't exist"),
        (tmp_path / "none", "doesn't exist"),
    ):
        with pytest.raises(UserError, match=f"row 7: image .*{path.name}.* {problem}"):
            open_image(path, "row 7")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient
    gray = open_image(Image.new("L", (3, 2)))
    assert gray.mode == "RGB" and gray.size == (3, 2)


def test_mean_counts() -> None:
    first = Answer("a", 10, 64, 12, 3, 2, 1)
    second = Answer("b", 20, 0, 0, 5, 4, 2)
    means = mean_counts([first, second])
    assert means["n"] == 2 and means["prompt_tokens"] == 15 and means["kept_output_share"] == 0.5
    assert "kept_tokens" not in mean_counts([Answer("a", 10, 64, None, 3, None, None)])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"colour": 1}, "colour: no such model argument"),
        ({"mode": "half"}, "mode: unknown value 'half'"),
        ({"vision_keep_rate": 0}, r"vision_keep_rate: 0.0 is outside \(0, 1\]"),
        ({"vision_keep_rate": 1.5}, "vision_keep_rate: 1.5 is outside"),
        ({"image_policy": "best"}, "image_policy: unknown value"),
    ],
)
def test_bad_settings_are_named(values: dict, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        ModelSettings.from_dict(values)


def test_settings_tell_runs_apart(tmp_path: Path) -> None:
    assert ModelSettings.from_dict({"vision_keep_rate": True}).vision_keep_rate == 1.0
    slugs = {
        ModelSettings("tiny").slug(),
        ModelSettings("tiny", mode="full").slug(),
        ModelSettings("tiny", vision_keep_rate=0.1).slug(),
        ModelSettings("org/tiny").slug(),
    }
    assert len(slugs) == 4 and not any("/" in slug for slug in slugs)
    settings = ModelSettings(str(tmp_path))
    before = settings.slug()
    (tmp_path / "model.safetensors").write_bytes(b"trained again")
    assert settings.slug() != before


def test_an_automatic_batch_size_fits_in_memory_and_says_so(
    engine: Engine, requests: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def auto(free: int) -> Engine:
        monkeypatch.setattr(engine_module, "free_bytes", lambda device: free)
        return Engine(engine.model, engine.processor, AUTO)

    assert auto(1 << 40).batch_size == 64 and auto(1).batch_size == 1
    sample = prefill_bytes(engine.model.config.text_config, 1, 2048, 4)
    assert auto(13 * sample).batch_size == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("batch_size: auto takes 4 (2,048 tokens take about 0.0") and said.endswith(
        "on cpu)"
    )
    with pytest.raises(UserError, match="batch_size: many is neither"):
        Engine(engine.model, engine.processor, "many")


def test_an_automatic_batch_that_finds_no_room_is_answered_in_halves(
    engine: Engine, requests: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    engine.model.set_sparsity(mode="image")
    expected = engine.generate(requests, SHORT)
    sizes, answer = [], engine_module.answer_batch

    def crowded(calls: Any, batch: Any, generation: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return answer(calls, batch, generation)

    monkeypatch.setattr(engine_module, "answer_batch", crowded)
    auto = Engine(engine.model, engine.processor, AUTO)
    assert auto.generate(requests * 2, SHORT) == expected * 2
    assert sizes[:3] == [16, 8, 4] and auto.batch_size == 2
    assert "batch_size: 4 found no room, goes on with 2\n" in capsys.readouterr().err
    sizes.clear()
    assert auto.generate(requests, SHORT) == expected and sizes == [2] * 4
    with pytest.raises(torch.OutOfMemoryError):
        Engine(engine.model, engine.processor, 8).generate(requests, SHORT)


def test_every_opener_scales_sixteen_bits(tmp_path: Path) -> None:
    """The package's and what training makes of it: neither cuts grey values off, both refuse a scale that no file tells."""
    values = (np.arange(48, dtype=np.uint16) * 1365).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tiff")
    sample = Sample("row 7", ("grey.png",), ())
    opened = [
        open_image(tmp_path / "grey.png"),
        *open_images(sample, tmp_path),
    ]
    for picture in opened:
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture)[..., 1], values // 257)
    assert np.array_equal(np.asarray(open_image(Image.open(tmp_path / "grey.png"))), np.asarray(opened[0]))
    with pytest.raises(
        UserError, match=r"row 7: image .*float\.tiff: grey values of mode 'F' have no known scale"
    ):
        open_image(tmp_path / "float.tiff", "row 7")
    with pytest.raises(
        UnusableSample, match=r"row 7: unreadable image .*float\.tiff: grey values of mode 'F'"
    ):
        open_images(Sample("row 7", ("float.tiff",), ()), tmp_path)
