"""The adapters' own logic, without a harness around them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from lmms_eval.api.instance import Instance, unwrap_generation_output
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answering import answer_batch
from dynllava_plugin.evaluation.engine.answers import Answer, Score
from dynllava_plugin.evaluation.engine.prompting import VICUNA
from dynllava_plugin.evaluation.engine.requests import Generation
from dynllava_plugin.evaluation.lmms_eval.model import DynamicLlava, LossAndGreedy
from dynllava_plugin.evaluation.results.journal import Journal
from dynllava_plugin.evaluation.results.record import RunRecord
from dynllava_plugin.evaluation.vlmevalkit.outcome import check_run, forget_finished

ANSWER = Answer("yes", 1, 0, 0, 1, 0, 0)
SCORE = Score(-1.0, 1, True)


def test_entry_point_names_the_model() -> None:
    (point,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "dynllava"]
    assert point.load().model_id == "dynllava"


def test_loss_survives_lmms_evals_unwrapping() -> None:
    pair = LossAndGreedy(1.5, True)
    assert pair == (1.5, True)
    assert unwrap_generation_output(pair) == ((1.5, True), None)


@pytest.fixture(scope="module")
def lm() -> DynamicLlava:
    return DynamicLlava(batch_size="2", device="cpu", pretrained="tiny", mode="image_text")


def request(lm: DynamicLlava, kind: str, index: int, arguments: tuple) -> Instance:
    metadata = {"task": arguments[-2], "doc_id": index, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


@pytest.fixture
def documents(lm: DynamicLlava) -> list[dict[str, Any]]:
    docs = [
        {"image": Image.new("RGB", (20 + 9 * i, 30), color), "q": color}
        for i, color in enumerate(("red", "blue"))
    ]
    lm.task_dict = {"first": {"test": docs}, "second": {"test": docs}}
    return docs


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"]]


def test_generate_until_mixes_tasks_and_keeps_the_order(lm: DynamicLlava, documents: list) -> None:
    short, long = {"max_new_tokens": 2, "until": ["\n\n"]}, {"max_new_tokens": 9}
    calls = [
        ("is it red?", short, visual, 0, "first", "test"),
        ("Describe the image in detail.", long, visual, 1, "second", "test"),
        ("what is grass?", short, None, 0, "second", "test"),
        ("<image>\nwhat color is the shape?", short, visual, 1, "first", "test"),
    ]
    requests = [request(lm, "generate_until", call[3], call) for call in calls]
    lm.record = RunRecord()
    together = [(r.text, r.token_counts.output_tokens) for r in lm.generate_until(requests)]
    noted = lm.record.to_dict("lmms-eval")["tokens"]
    assert {name: counts["n"] for name, counts in noted.items()} == {"first": 2, "second": 2}
    alone = [lm.generate_until([one])[0] for one in requests]
    assert together == [(r.text, r.token_counts.output_tokens) for r in alone]
    assert together[1][1] <= 9 and all(count <= 2 for _, count in (together[0], *together[2:]))


def test_loglikelihood_ranks_choices(lm: DynamicLlava, documents: list) -> None:
    question = "is it red?\nAnswer the question using a single word or phrase."
    choices = ["yes", lambda doc: " blorb quux " + doc["q"]]
    requests = [
        request(lm, "loglikelihood", 0, (question, choice, visual, 0, "first", "test")) for choice in choices
    ]
    (likely, _), (unlikely, greedy) = lm.loglikelihood(requests)
    assert 0 <= likely < unlikely and greedy is False


def test_multi_round_asks_the_task_for_each_round(lm: DynamicLlava, documents: list) -> None:
    seen: list[tuple] = []

    def next_round(doc: Any, previous_output: list, round_idx: int, previous_round_info: Any) -> tuple:
        seen.append((len(previous_output), round_idx, previous_round_info))
        finished = round_idx == 2 + documents.index(doc)
        return visual(doc), f"round {round_idx}?", finished, previous_output, {"round": round_idx}

    arguments = {"max_new_tokens": 3}
    requests = [
        request(
            lm,
            "generate_until_multi_round",
            i,
            ("what color?", arguments, visual, next_round, i, "first", "test"),
        )
        for i in range(2)
    ]
    answers = lm.generate_until_multi_round(requests)
    assert [len(item) for item in answers] == [2, 3]
    assert seen[0] == (1, 1, None) and seen[-1] == (3, 3, {"round": 2})


TALK = [
    ("what color is the shape?", "it is red."),
    ("Is it a circle?", "no"),
    ("Describe the image.", "a shape"),
]


def test_conversations_keep_earlier_answers_as_output_text(lm: DynamicLlava, documents: list) -> None:
    """By lmms-eval's protocol and by hand; the loss is the logarithm of the rounds' mean perplexity."""

    def next_round(doc: Any, previous_output: list, round_idx: int, previous_round_info: Any) -> tuple:
        finished = round_idx == len(TALK)
        question = "" if finished else TALK[round_idx][0]
        return None, question, finished, previous_output, {"conversation": True}

    arguments = {"max_new_tokens": 4}
    call = (TALK[0][0], arguments, visual, next_round, 0, "first", "test")
    lm.record = RunRecord()
    (answers,) = lm.generate_until_multi_round([request(lm, "generate_until_multi_round", 0, call)])
    image, turns, by_hand = documents[0]["image"], [], []
    for question, _ in TALK:
        asked = VICUNA.request([*turns, (question, None)], [image], "by hand")
        by_hand += lm.engine.generate([asked], Generation.from_task(arguments))
        turns.append((question, by_hand[-1].text))
    assert answers == [answer.text for answer in by_hand]
    noted = lm.record.to_dict("lmms-eval")["tokens"]["first"]
    assert noted["n"] == 1 and noted["generated_tokens"] == sum(a.generated_tokens for a in by_hand)

    call = ("", lambda doc: TALK, visual, 1, "first", "test")
    ((loss, _),) = lm.loglikelihood([request(lm, "loglikelihood", 1, call)])
    whole = VICUNA.request([*TALK[:2], (TALK[2][0], None)], [documents[1]["image"]], "x", TALK[2][1])
    (score,) = lm.engine.score([whole])
    assert math.exp(loss) == pytest.approx(score.perplexity) and len(score.rounds) == 3


def test_padding_requests_are_answered_but_not_noted(lm: DynamicLlava, documents: list) -> None:
    call = ("is it red?", {"max_new_tokens": 2}, visual, 0, "first", "test")
    plain, padding = (request(lm, "generate_until", 0, call) for _ in range(2))
    padding.metadata["__padding_only__"] = True
    lm.record = RunRecord()
    assert len(lm.generate_until([plain, padding])) == 2
    assert lm.record.to_dict("lmms-eval")["tokens"]["first"]["n"] == 1


def test_images_are_decoded_when_their_turn_comes(lm: DynamicLlava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all at once: a benchmark has more images than memory. One decode a question, in the background."""
    decoded: list[str] = []

    class Documents:
        def __getitem__(self, index: int) -> dict[str, Any]:
            decoded.append(threading.current_thread().name)
            return {"image": Image.new("RGB", (16, 16), (index % 7, 0, 0))}

    done: list[int] = []
    lm.task_dict = {"many": {"test": Documents()}}
    monkeypatch.setattr("dynllava_plugin.evaluation.engine.engine._WINDOW", 4)
    monkeypatch.setattr(
        "dynllava_plugin.evaluation.engine.engine.answer_batch",
        lambda calls, batch, generation: done.append(len(decoded)) or [ANSWER] * len(batch),
    )
    calls = [("is it red?", {}, visual, index, "many", "test") for index in range(20)]
    lm.generate_until([request(lm, "generate_until", 0, call) for call in calls])
    assert len(decoded) == 20 and all(name.startswith("prefetch") for name in decoded)
    assert done[0] <= 8 and done[-1] == 20  # the first batch starts when at most two windows are decoded


def test_a_run_that_was_cut_short_asks_only_what_is_missing(
    lm: DynamicLlava, documents: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [("is it red?", {"max_new_tokens": 2}, visual, 0, "first", "test")]
    calls.append(("Describe the image.", {"max_new_tokens": 5}, visual, 1, "second", "test"))
    monkeypatch.setattr(lm, "_journal", Journal(tmp_path))
    requests = [request(lm, "generate_until", call[3], call) for call in calls]
    before = [answer.text for answer in lm.generate_until(requests[:1])]
    monkeypatch.setattr(lm, "_journal", Journal(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(
        "dynllava_plugin.evaluation.engine.engine.answer_batch",
        lambda calls, batch, generation: (
            asked.extend(item.request.name for item in batch) or answer_batch(calls, batch, generation)
        ),
    )
    lm.record = RunRecord()
    after = [answer.text for answer in lm.generate_until(requests)]
    assert asked == ["second test 1"] and after[:1] == before
    assert {name: part["n"] for name, part in lm.record.to_dict("x")["tokens"].items()} == {
        "first": 1,
        "second": 1,
    }


def test_lmms_eval_names_bad_samples_and_arguments(lm: DynamicLlava, documents: list) -> None:
    def generate(text: str, images: Any) -> None:
        lm.generate_until([request(lm, "generate_until", 1, (text, {}, images, 1, "first", "test"))])

    with pytest.raises(UserError, match="first test 1: the question is empty"):
        generate(" ", visual)
    with pytest.raises(UserError, match="first test 1: the question has 2 <image> but 1"):
        generate("<image><image>?", visual)
    with pytest.raises(UserError, match=r"first test 1: the model reads images and video files, not dict"):
        generate("what?", lambda doc: [{"array": 1}])
    with pytest.raises(UserError, match="colour: no such model argument"):
        DynamicLlava(pretrained="tiny", colour="red")
    with pytest.raises(UserError, match="batch_size: 'many'"):
        DynamicLlava(pretrained="tiny", batch_size="many")
    auto = DynamicLlava(pretrained="tiny", device="cpu", batch_size="auto", max_batch_size="16")
    assert auto.batch_size == auto.engine.batch_size == 16


def write_status(folder: Path, **entries: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"datasets": entries}))


@pytest.mark.parametrize(
    ("entry", "failure"),
    [
        ({"status": "done", "metrics": {"Overall": 1}}, None),
        ({"status": "done", "metrics": {}, "skip_reason": "mode_infer"}, None),
        ({"status": "infer"}, "didn't finish"),
        ({"status": "done", "metrics": {"Overall": 1}, "error_message": "no space left"}, "no space left"),
        ({"status": "done", "skip_reason": "invalid_dataset"}, "invalid_dataset"),
        ({"status": "done", "skip_reason": "No infer result found"}, "No infer result"),
        ({"status": "done", "metrics": {}}, "scored nothing"),
        ({}, "didn't finish"),
    ],
)
def test_exit_code_follows_the_kits_status(tmp_path: Path, entry: dict, failure: str | None) -> None:
    write_status(tmp_path / "m", Set=entry)
    found = check_run(tmp_path / "m", "m", ["Set"], time.time())
    assert found == [] if failure is None else len(found) == 1 and failure in found[0]
    assert len(check_run(tmp_path / "m", "m", ["Set", "Other"], time.time())) == len(found) + 1


def test_exit_code_without_a_status_file_follows_the_score_files(tmp_path: Path) -> None:
    started = time.time()
    (tmp_path / "m_Set.xlsx").touch()
    assert "Set: VLMEvalKit wrote no score" in check_run(tmp_path, "m", ["Set"], started)[0]
    score = tmp_path / "m_Set_acc.csv"
    score.touch()
    assert check_run(tmp_path, "m", ["Set"], started) == []
    os.utime(score, (started - 100, started - 100))  # an earlier run's
    assert len(check_run(tmp_path, "m", ["Set"], started)) == 1


def test_upstream_checkout_is_found(tmp_path: Path) -> None:
    (tmp_path / "vlmeval").mkdir()
    (tmp_path / "vlmeval" / "__init__.py").touch()
    (tmp_path / "run.py").write_text("def main():\n    return 'upstream'\n")
    code = "from dynllava_plugin.evaluation.vlmevalkit.setup import import_kit; print(import_kit().main())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "upstream", done.stderr


def test_all_files_of_a_dataset_are_forgotten_and_none_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "dynllava"
    folder.mkdir()
    derived = ("_acc.csv", "_auxmatch.xlsx", "_exact_matching_result.pkl", "_PREV.pkl", "_score.csv", ".tsv")
    others = (
        "dynllava_Set_B.tsv",
        "dynllava_Set_B_acc.csv",
        "01_Set_B.pkl",
        "dynllava_run.json",
        "x_Set.pkl",
    )
    for name in (*(f"dynllava_Set{ending}" for ending in derived), "01_Set.pkl", "12_Set.pkl", *others):
        (folder / name).touch()
    write_status(folder, Set={"status": "done", "metrics": {"Overall": 1}}, Set_B={"status": "done"})
    forget_finished(folder, "dynllava", ["Other"], ["Set", "Set_B", "Other"])
    assert len(list(folder.iterdir())) == len(derived) + 2 + len(others) + 1
    forget_finished(folder, "dynllava", ["Set"], ["Set", "Set_B", "Other"])
    assert {path.name for path in folder.iterdir()} == {*others, "status.json"}
    assert json.loads((folder / "status.json").read_text())["datasets"] == {"Set_B": {"status": "done"}}


class Questions:
    """A dataset as the kit has them."""

    def __init__(self, count: int) -> None:
        self.data = pd.DataFrame({"index": range(count), "question": [f"is it {i}?" for i in range(count)]})

    def build_prompt(self, line: Any) -> list[dict[str, str]]:
        return [{"type": "text", "value": line["question"]}]

    def dump_image(self, line: Any) -> list[str]:
        return []


def kit_model(calls: list[int], size: int = 1) -> Any:
    """The adapter with a model that answers with the question itself; it looks four batches ahead."""
    from dynllava_plugin.evaluation.engine.answers import Answer
    from dynllava_plugin.evaluation.results.journal import Journal
    from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava as KitModel

    class Echo:
        batch_size = size
        seconds, started, style = 0.0, None, VICUNA
        calls = SimpleNamespace(seconds=0.0, shared_prompts=0)

        def generate(self, requests: list, generation: Any, on_batch: Any = None) -> list[Answer]:
            calls.append(len(requests))
            answers = [
                Answer(r.prompt.split("USER: ")[1].split(" ASSISTANT")[0], 1, 0, 0, 1, 0, 0) for r in requests
            ]
            if on_batch:
                on_batch(list(range(len(requests))), answers)
            return answers

    model = KitModel.__new__(KitModel)
    model.engine, model.max_new_tokens, model.prompts = Echo(), 8, "llava"
    model._journal, model.record = Journal(None), RunRecord()
    return model


def test_vlmevalkit_looks_ahead_and_answers_the_same() -> None:
    calls: list[int] = []
    model, dataset = kit_model(calls), Questions(9)
    model.set_dump_image(dataset.dump_image)
    rows = [dataset.data.iloc[i] for i in range(9)]
    answers = [model.generate(dataset.build_prompt(row), "Questions")["prediction"] for row in rows]
    assert answers == list(dataset.data["question"]) and calls == [4, 4, 1]

    calls.clear()
    model.set_dump_image(dataset.dump_image)  # a resumed run: the first rows were answered before
    answers = [model.generate(dataset.build_prompt(row), "Questions")["prediction"] for row in rows[3:]]
    assert answers == list(dataset.data["question"])[3:] and calls == [4, 2]


def test_vlmevalkit_counts_rows_however_many_rounds_they_have(tmp_path: Path) -> None:
    from dynllava_plugin.evaluation.vlmevalkit.model import TURNS

    model, dataset = kit_model([]), Questions(3)
    model._journal = Journal(tmp_path)
    model.engine.score = lambda requests, note: (
        note(range(len(requests)), [SCORE] * len(requests)) or [SCORE] * len(requests)
    )
    turns = [["what?", "this"], ["and?", "that"]]
    dataset.build_prompt = lambda line: [{"type": "text", "value": line["question"], TURNS: turns}]
    model.set_dump_image(dataset.dump_image)
    for row in range(3):
        model.generate(dataset.build_prompt(dataset.data.iloc[row]), "Talks")
    assert json.loads((tmp_path / "progress-0.json").read_text()) == {"done": 3, "total": 3}


def test_vlmevalkit_tells_images_of_one_name_apart(tmp_path: Path) -> None:
    """A run that was cut short took one's answer for the other's: the same question about two folders' 1.png."""
    calls: list[int] = []
    for name in ("coco", "wikiart"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")

    def ask(*names: str) -> None:
        model = kit_model(calls)
        model._journal = Journal(tmp_path / "journal")
        model.set_dump_image(Questions(1).dump_image)
        for name in names:
            image = {"type": "image", "value": str(tmp_path / name / "1.png")}
            model.generate([image, {"type": "text", "value": "what?"}], "D")

    ask("coco")
    ask("coco", "wikiart")
    assert calls == [1, 1]  # wikiart's was not asked before


def test_vlmevalkit_stops_looking_ahead_where_it_guesses_wrong() -> None:
    calls: list[int] = []
    model, dataset = kit_model(calls), Questions(9)
    model.set_dump_image(dataset.dump_image)
    for row in (0, 3, 7, 4, 1):
        prompt = dataset.build_prompt(dataset.data.iloc[row])
        assert model.generate(prompt, "Questions")["prediction"] == f"is it {row}?"
    assert calls == [4, 1, 1, 1]


def test_vlmevalkit_looks_ahead_over_rows_that_ask_the_same() -> None:
    calls: list[int] = []
    model, dataset = kit_model(calls), Questions(9)
    dataset.data["question"] = ["is it 0?", "is it 0?", *dataset.data["question"][2:]]
    model.set_dump_image(dataset.dump_image)
    rows = [dataset.data.iloc[i] for i in range(9)]
    answers = [model.generate(dataset.build_prompt(row), "Questions")["prediction"] for row in rows]
    assert answers == list(dataset.data["question"]) and calls == [4, 4, 1]


def test_vlmevalkit_refuses_video() -> None:
    model = kit_model([])
    model.set_dump_image(Questions(1).dump_image)
    with pytest.raises(UserError, match=r"the model reads images and text, not video"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}, {"type": "text", "value": "what?"}], "V")


def test_vlmevalkit_conversations_equal_lmms_evals(lm: DynamicLlava, tmp_path: Path) -> None:
    """The same rounds, the same context, the same score."""
    from dynllava_plugin.evaluation.vlmevalkit.model import TURNS
    from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava as KitModel

    path = tmp_path / "image.png"
    Image.new("RGB", (20, 30), "red").save(path)
    model = KitModel(batch_size=2, device="cpu", pretrained="tiny", mode="image_text", max_new_tokens=4)
    model.set_dump_image(Questions(1).dump_image)
    text = {"type": "text", "value": TALK[0][0], TURNS: [list(turn) for turn in TALK]}
    found = model.generate([{"type": "image", "value": str(path)}, text], "Talks")
    lm.task_dict = {"first": {"test": [{"image": Image.open(path)}]}}

    def next_round(doc: Any, previous_output: list, round_idx: int, previous_round_info: Any) -> tuple:
        finished = round_idx == len(TALK)
        return None, "" if finished else TALK[round_idx][0], finished, None, {"conversation": True}

    call = (TALK[0][0], {"max_new_tokens": 4}, visual, next_round, 0, "first", "test")
    (answers,) = lm.generate_until_multi_round([request(lm, "generate_until_multi_round", 0, call)])
    assert json.loads(found["prediction"]) == answers
    call = ("", lambda doc: TALK, visual, 0, "first", "test")
    ((loss, _),) = lm.loglikelihood([request(lm, "loglikelihood", 0, call)])
    assert found["extra_records"]["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("dataset", "row", "text"),
    [
        ("POPE", {"question": "Is there a cat? Please answer yes or no."}, "Is there a cat?\nAnswer the question using"),
        ("VizWiz", {"question": "What is it?"}, "What is it?\nWhen the provided information is insufficient"),
        ("RealWorldQA", {"question": "Which?", "A": "left", "B": "right", "C": float("nan")}, "Which?\nA. left\nB. right\nAns"),
        ("MMBench_DEV_EN", {"question": "Which?", "hint": "Look.", "A": "1", "B": "2"}, "Look.\nWhich?\nA. 1\nB. 2\nAnswer"),
    ],
)  # fmt: skip
def test_llava_wording(dataset: str, row: dict, text: str) -> None:
    from dynllava_plugin.evaluation.vlmevalkit.prompts import has_own_wording, llava_question

    assert has_own_wording(dataset) and llava_question(dataset, row).startswith(text)
    assert not has_own_wording("GQA_TestDev_Balanced") and not has_own_wording("CV-Bench-2D")
    model = kit_model([])
    assert model.use_custom_prompt(dataset) and not model.use_custom_prompt("GQA_TestDev_Balanced")
    model.prompts = "kit"
    assert not model.use_custom_prompt(dataset)
