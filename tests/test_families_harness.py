"""Every family in both harnesses, on tiny checkpoints as from its hub: the same answers as lmms-eval's own models."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.requests import Generation
from dynllava_plugin.evaluation.lmms_eval.model import DynamicLlava
from dynllava_plugin.evaluation.results.manifest import run_settings
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava as KitModel
from dynllava_plugin.model.prompts import CHAT_TEMPLATE
from tests.commands import LMMS_EVAL, VLMEVALKIT, Finished, run_command
from tests.families.checkpoints import FAMILIES, picture, write_checkpoint
from tests.minis import hub_short
from tests.minis.hub import write_repo
from tests.minis.kit_sets import write_tsvs

LIMIT = 5
HELPFUL = "You are a helpful assistant."
every_family = pytest.mark.parametrize("family", FAMILIES)
# lmms-eval's own model of a family: its module, class and arguments, and what ours is given to be asked the same.
LLAVA_HF: Any = ("llava_hf", "LlavaHf", {}, {})
WRAPPERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava_llama": LLAVA_HF,
    "llava_qwen2": LLAVA_HF,
    "llava_mistral": LLAVA_HF,
    "llava_next": LLAVA_HF,
    "llava_onevision": LLAVA_HF,
    # The pixels of the tiny processors, not the models' own limits; weights are rounded to bfloat16 whatever is asked.
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VL", {"min_pixels": 784, "max_pixels": 12544},
                   {"dtype": "bfloat16"}),
    "qwen3_vl": ("qwen3_vl", "Qwen3_VL", {"min_pixels": 1024, "max_pixels": 16384},
                 {"dtype": "bfloat16", "system_prompt": HELPFUL}),
    "internvl": ("internvl_hf", "InternVLHf", {"max_patches": 6}, {"dtype": "bfloat16"}),
}  # fmt: skip
# Sizes that need no resizing where the two resize otherwise: the original LLaVA-1.5's images are resized by PIL; lmms-eval's
# Qwen models resize an image once more, to multiples of 28 or 32 pixels a side and at least four of their squares.
SIZES = {
    "llava_llama": [(28, 28)],
    "llava_qwen2": [(28, 28)],
    "llava_mistral": [(28, 28)],
    "qwen2_5_vl": [(56, 84), (56, 56), (112, 84)],
    "qwen3_vl": [(64, 96), (64, 64), (96, 64)],
}
QUESTIONS = [
    "What color is the shape?", "Is there a red circle in the picture?", "Yes or no?", "How many shapes are there?\nAnswer:",
    "Which shape is on the left? Describe the picture in detail.",
]  # fmt: skip
ARGUMENTS = {"max_new_tokens": 12, "do_sample": False, "until": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint, written once."""
    written: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in written:
            written[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return written[family]

    return of


def documents(family: str) -> list[dict[str, Any]]:
    sizes = SIZES.get(family, [(28, 28), (84, 56), (28, 84)])
    return [
        {"image": picture(sizes[index % len(sizes)], index), "question": question}
        for index, question in enumerate(QUESTIONS)
    ]


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"]]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def instances(arguments: Callable[[int], tuple[Any, ...]]) -> list[Instance]:
    metadata = {"task": "task", "repeats": 1}
    return [
        Instance(
            request_type="generate_until", arguments=arguments(i), idx=0, metadata={**metadata, "doc_id": i}
        )
        for i in range(LIMIT)
    ]


def our_answers(lm: DynamicLlava, docs: list[dict[str, Any]], **arguments: Any) -> list[str]:
    lm.task_dict = {"task": {"test": docs}}
    given = {**ARGUMENTS, **arguments}
    asked = instances(lambda i: (docs[i]["question"], dict(given), visuals, i, "task", "test"))
    return [result.text for result in lm.generate_until(asked)]


def kept(family: str, tokens: int) -> int:
    """A fifth of an image's tokens, at least one; InternVL's tiles of 16 are decided one by one."""
    return tokens // 16 * 3 if family == "internvl" else max(1, int(0.2 * tokens))


@pytest.mark.parametrize("family", WRAPPERS)
def test_full_context_answers_as_lmms_evals_own_model(family: str, folder: Callable[[str], Path]) -> None:
    module, name, theirs, ours = WRAPPERS[family]
    path, docs = folder(family), documents(family)
    if (
        family == "llava_llama"
    ):  # asked as LLaVA-1.5's evaluation does, which the hub's template leaves a sentence out of
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    stock = getattr(importlib.import_module(f"lmms_eval.models.chat.{module}"), name)
    wrapper = stock(pretrained=str(path), device="cpu", device_map="cpu", **theirs)
    wrapper.model.float()  # bfloat16 weights; sums in float32, which no order of adding changes
    wrapper.task_dict = {"task": {"test": docs}}
    with torch.no_grad():
        found = wrapper.generate_until(
            instances(lambda i: (docs[i]["question"], messages, dict(ARGUMENTS), i, "task", "test"))
        )
    lm = DynamicLlava(batch_size="2", device="cpu", pretrained=str(path), mode="full", **ours)
    lm.engine.model.float()
    wanted = [result.text.strip() for result in found]
    assert our_answers(lm, docs) == wanted
    assert len(set(wanted)) > 1 and all(wanted)


@every_family
def test_both_harnesses_answer_easy_vqa_alike(
    family: str, folder: Callable[[str], Path], easy_vqa_data: Path
) -> None:
    """Batches of other sizes, images of other token counts than text; what stays is counted an image at a time."""
    from dynllava_plugin.evaluation.vlmevalkit.datasets import EasyVQA

    settings = {"pretrained": str(folder(family)), "device": "cpu", "mode": "image_text"}
    kit, dataset = KitModel(batch_size=3, **settings), EasyVQA("EasyVQA")
    kit.set_dump_image(dataset.dump_image)
    asked = [dataset.build_prompt(dataset.data.iloc[row]) for row in range(LIMIT)]
    found = [kit.generate([dict(part) for part in message], "EasyVQA") for message in asked]
    docs = [
        {"image": Image.open(message[0]["value"]).convert("RGB"), "question": message[1]["value"]}
        for message in asked
    ]
    lm = DynamicLlava(batch_size="2", **settings)
    answers = our_answers(lm, docs, max_new_tokens=16)
    assert [answer["prediction"] for answer in found] == answers and any(answers)
    for record in (answer["extra_records"] for answer in found):
        assert record["image_tokens"] > 0
        assert record["kept_image_tokens"] == kept(family, record["image_tokens"])
        assert 0 <= record["kept_tokens"] <= record["cached_tokens"] == record["generated_tokens"] - 1
    noted = lm.record.to_dict("lmms-eval")["tokens"]["task"]
    mean = sum(answer["extra_records"]["kept_image_tokens"] for answer in found) / LIMIT
    assert noted["n"] == LIMIT and noted["kept_image_tokens"] == mean
    assert noted["equivalent_tokens"] > 0 and noted["kv_mib"] > 0


@every_family
def test_images_of_different_token_counts_and_rounds_share_a_batch(
    family: str, folder: Callable[[str], Path]
) -> None:
    """Two images, one, none, and a conversation: answers, counts, costs and scores are those of one at a time."""
    lm = DynamicLlava(batch_size="4", device="cpu", pretrained=str(folder(family)), mode="image_text")
    engine = lm.engine
    wide, tall = picture((84, 56), 0), picture((28, 84), 1)
    talk: list[tuple[str, str | None]] = [("What color is it?", "red"), ("And the shape?", None)]
    requests = [
        engine.style.request([("Are both red?", None)], [wide, tall], "two", "yes they are"),
        engine.style.request([("What color is the shape?", None)], [tall], "one", "green"),
        engine.style.request([("What color is grass?", None)], [], "none", "green grass"),
        engine.style.request(talk, [wide], "talk", "circle"),
    ]
    short = Generation.from_task({"max_new_tokens": 6})
    batch = engine.generate(requests, short)
    assert batch == [engine.generate([request], short)[0] for request in requests]
    two, one, none, rounds = batch
    assert none.image_tokens == none.kept_image_tokens == 0
    alone = [one.image_tokens, rounds.image_tokens]
    # LLaVA-OneVision cuts an image into tiles only where it is the only one.
    if family != "llava_onevision":
        assert two.image_tokens == sum(alone)
        assert two.kept_image_tokens == sum(kept(family, count) for count in alone)
    scores = engine.score(requests)
    for score, request in zip(scores, requests, strict=True):
        (single,) = engine.score([request])
        assert score.logprob == pytest.approx(single.logprob, abs=1e-3)
        assert (score.tokens, score.kept_tokens, score.cost) == (
            single.tokens,
            single.kept_tokens,
            single.cost,
        )
    first, second = scores[3].rounds
    plain = engine.style.request([("What color is it?", None)], [wide], "plain", "red")
    if family not in (
        "llava_qwen2",
        "llava_onevision",
    ):  # whose templates write a space more before an old answer
        assert first.logprob == pytest.approx(engine.score([plain])[0].logprob, abs=1e-3)
    assert second.tokens == scores[3].tokens - first.tokens > 0


@pytest.mark.parametrize(
    "family", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3"]
)
def test_a_prompt_is_what_the_processor_itself_makes_of_the_messages(
    family: str, folder: Callable[[str], Path]
) -> None:
    """Token for token: Mistral's beginning of text, which its template writes, stands there once."""
    engine = DynamicLlava(pretrained=str(folder(family)), device="cpu", mode="full").engine
    image, question = picture((84, 56), 0), "What color is the shape?"
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    wanted = engine.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    request = engine.style.request([(question, None)], [image], "one")
    assert engine.encoder.prepare(0, request, request.prompt).ids == list(map(int, wanted["input_ids"][0]))


def test_a_scored_answer_is_what_the_family_would_write(folder: Callable[[str], Path]) -> None:
    """Greedy decoding in full context gives the answer; scored, it is greedy and has generate's own log-probabilities."""
    lm = DynamicLlava(batch_size="2", device="cpu", pretrained=str(folder("qwen2_5_vl")), mode="full")
    image = picture((56, 84), 0)
    model, engine = lm.engine.model, lm.engine
    model.generation_config.repetition_penalty = 1.0
    request = engine.style.request([("What color is the shape?", None)], [image], "one", "red circle")
    ids = engine.processor(text=[request.prompt + "red circle"], images=[[image]], return_tensors="pt")
    logits = model(**ids, logits_to_keep=0).logits[0].log_softmax(-1)
    tokens = engine.processor.tokenizer("red circle")["input_ids"]
    wanted = sum(float(logits[place - len(tokens) - 1, token]) for place, token in enumerate(tokens))
    (score,) = engine.score([request])
    assert score.tokens == len(tokens) and score.logprob == pytest.approx(wanted, abs=1e-4)


@pytest.fixture(scope="module")
def done(
    folder: Callable[[str], Path], easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Finished]:
    """Both harnesses with a tiny Qwen2.5-VL: the easy-VQA sets, and a miniature of POPE."""
    root = tmp_path_factory.mktemp("commands")
    write_repo(root / "datasets", "lmms-lab-encoder/POPE", hub_short.pope())
    write_tsvs(root / "LMUData")
    path = str(folder("qwen2_5_vl"))
    lmms = ["--model", "dynllava", "--model_args", f"pretrained={path}", "--batch_size", "2", "--log_samples"]
    lmms += ["--tasks", "easy_vqa,easy_vqa_describe,pope", "--output_path", str(root / "results" / "lmms")]
    kit = ["--model", "dynllava", "--pretrained", path, "--work-dir", str(root / "results" / "kit")]
    kit += ["--data", "EasyVQA", "EasyVQA_Describe", "POPE", "--data-root", str(root / "LMUData")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        return [
            run_command(
                module, [*typed, "--limit", "2"], root / "datasets", DYNLLAVA_EASY_VQA=str(easy_vqa_folder)
            )
            for module, typed in ((LMMS_EVAL, lmms), (VLMEVALKIT, kit))
        ]


def test_both_commands_give_one_table(done: list[Finished]) -> None:
    assert [command.code for command in done] == [0, 0], "\n".join(command.text[-3000:] for command in done)
    table = read_results(done[0].folder.parent / "results")
    assert {"easy_vqa", "easy_vqa_describe", "POPE"} == set(table["benchmark"])
    assert set(table["mode"]) == {"image_text"} and set(table["status"]) == {"scored"}
    for (benchmark, _), pair in table.groupby(["benchmark", "metric"]):
        if benchmark != "POPE":  # whose rows the harnesses have in another order
            assert sorted(pair["harness"]) == ["lmms-eval", "vlmevalkit"]
            assert pair["value"].nunique() == 1 or pair["value"].iloc[0] == pytest.approx(
                pair["value"].iloc[1], rel=1e-4
            )
    assert set(table[table["benchmark"] == "POPE"]["harness"]) == {"lmms-eval", "vlmevalkit"}
    assert (table["kept_image_tokens"] < table["image_tokens"]).all() and (
        table["kept_image_tokens"] >= 1
    ).all()


def test_our_tasks_ask_lmms_evals_own_models_too(easy_vqa_data: Path) -> None:
    """By messages, as they want it; lmms-eval itself would hand them what a model asked by a text wants."""
    from lmms_eval.tasks import TaskManager

    from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER, tell_how_to_ask

    manager = TaskManager("ERROR", include_path=str(TASKS_FOLDER), include_defaults=False)
    loaded = manager.load_task_or_group(["easy_vqa", "easy_vqa_describe"], "chat")
    task, row = loaded["easy_vqa"], loaded["easy_vqa"].dataset["test"][0]
    for messages_wanted in (True, False):
        tell_how_to_ask(loaded, messages_wanted)
        (request,) = [
            task.construct_requests(
                0, row["question"], metadata={"task": "easy_vqa", "doc_id": 0, "repeats": 1, "split": "test"}
            )
        ]
        asked = request.args[1](row) if messages_wanted else request.args[1]
        if messages_wanted:
            (turn,) = asked
            assert [part["type"] for part in turn["content"]] == ["image", "text"]
            assert turn["content"][1]["text"] == row["question"]
        else:
            assert asked["max_new_tokens"] == 16
    (group,) = [found for found in loaded.values() if isinstance(found, dict)]
    assert not any(found.messages for found in group.values())


@pytest.mark.parametrize("family", ["llava_llama", "llava_qwen2", "qwen2_5_vl"])
def test_what_cannot_be_asked_is_named(family: str, folder: Callable[[str], Path]) -> None:
    settings = {"pretrained": str(folder(family)), "device": "cpu", "mode": "full"}
    if family == "llava_llama":
        with pytest.raises(UserError, match=r"system_prompt: LLaVA-1\.5's prompt has its own"):
            DynamicLlava(system_prompt=HELPFUL, **settings)
        return
    engine = DynamicLlava(system_prompt=HELPFUL, **settings).engine
    token, image = engine.processor.image_token, picture((28, 28), 0)
    assert HELPFUL in engine.style.prompt([("Is it red?", None)], 0, "row 7")
    with pytest.raises(UserError, match="row 7: the question is empty"):
        engine.style.request([(" ", None)], [image], "row 7")
    if family == "qwen2_5_vl":
        with pytest.raises(UserError, match=r"row 7: the prompt has 2 .* but 1 images came with it"):
            engine.generate([engine.style.request([(f"Is {token} red?", None)], [image], "row 7")])
        with pytest.raises(UserError, match=r"row 7: the checkpoint's processor refuses it .*aspect ratio"):
            narrow = Image.new("RGB", (3000, 10))
            engine.generate([engine.style.request([("Is it red?", None)], [narrow], "row 7")])


def test_limits_of_pixels(folder: Callable[[str], Path]) -> None:
    """They change how many tokens an image has, and what tables call the run."""
    image = picture((84, 56), 0)

    def count(**limits: Any) -> int:
        engine = Engine.load(ModelSettings(str(folder("qwen2_5_vl")), device="cpu", mode="full", **limits))
        request = engine.style.request([("Is it red?", None)], [image], "row 7")
        return engine.encoder.prepare(0, request, request.prompt).ids.count(
            engine.model.config.image_token_id
        )

    assert count() == 24
    assert (
        4 <= count(max_pixels=1568) <= 8 < 80 <= count(min_pixels=80 * 14 * 14, max_pixels=84 * 14 * 14 * 2)
    )
    with pytest.raises(UserError, match="min_pixels, max_pixels: 20000 to 12544 pixels is no range"):
        count(min_pixels=20000)
    with pytest.raises(UserError, match="max_pixels: this checkpoint's images have no such limit"):
        Engine.load(ModelSettings(str(folder("internvl")), device="cpu", mode="full", max_pixels=2000))
    plain, limited = (ModelSettings("tiny", max_pixels=most) for most in (None, 2000))
    assert plain.slug() != limited.slug()
    names = [
        run_settings({"settings": {**settings.to_dict(), "checkpoint": "x"}}, "", Path("x"))["checkpoint"]
        for settings in (plain, limited, ModelSettings("tiny", system_prompt="Be brief."))
    ]
    assert names == ["x", "x (at most 2000 pixels)", "x (system prompt 'Be brief.')"]


def test_a_checkpoint_without_a_chat_template_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    bare = shutil.copytree(folder("qwen2_5_vl"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat_template: the checkpoint has none"):
        DynamicLlava(pretrained=str(bare), device="cpu", mode="full")
