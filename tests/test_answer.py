"""`dynllava answer`: LLaVA's questions to LLaVA's answers, as typed in the docs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dynllava_plugin.cli import main
from dynllava_plugin.evaluation.answer_command import read_questions
from dynllava_plugin.evaluation.own_sets import build_lvis, long_answers
from dynllava_plugin.evaluation.results.journal import Journal
from tests.families.checkpoints import picture

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "dynllava_plugin" / "assets" / "tiny_llava"
QUESTIONS = (
    {"question_id": 7, "image": "a.png", "text": "What color is the shape?", "category": "own"},
    {"question_id": "eight", "image": "sub/b.jpg", "text": "<image>\nIs there a circle?"},
    {"question_id": 9, "image": "a.png", "text": "What shape is in the image?"},
    {"question_id": 10, "image": "a.png", "text": "What color is the shape?"},
    {"question_id": 11, "image": "sub/b.jpg", "text": "Does the image contain a red shape?"},
)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that the docs give, in a folder with questions and images."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    picture((90, 70), 0).save(tmp_path / "images" / "a.png")
    picture((64, 128), 1).save(tmp_path / "images" / "sub" / "b.jpg")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS) + "\n")
    monkeypatch.chdir(tmp_path)
    docs = (ROOT / "docs" / "evaluation.md").read_text().splitlines()
    command = next(line for line in docs if line.startswith("    dynllava answer "))
    flags = ["--device", "cpu", "--batch-size", "2", "--max-new-tokens", "8"]
    return [*shlex.split(command.replace("CKPT", "tiny"))[1:], *flags]


@torch.no_grad()
def plain_answers() -> list[str]:
    """Stock transformers, one question at a time, LLaVA's prompt written out."""
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    processor = AutoProcessor.from_pretrained(TINY)
    found = []
    for row in QUESTIONS:
        question = row["text"].removeprefix("<image>\n")
        prompt = (
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
            f"helpful, detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:"
        )
        image = Image.open(Path("images") / row["image"]).convert("RGB")
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(text.strip())
    return found


def test_answers_are_those_of_plain_transformers(asked: list[str]) -> None:
    assert main([*asked, "--mode", "full"]) == 0
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in QUESTIONS]
    assert [row["prompt"] for row in rows] == [row["text"] for row in QUESTIONS]
    assert [row["text"] for row in rows] == plain_answers()
    for row in rows:
        assert set(row) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert row["model_id"] == "tiny" and row["metadata"]["kept_image_tokens"] == 64
    assert not list(Path().glob(".answers*"))
    assert main([*asked, "--mode", "full"]) == 2  # an answers file is never replaced


def test_an_interrupted_run_goes_on(asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Cut off behind the first batch; what it answered isn't asked again, under another policy all of it is."""
    asked += ["--policy", "random,keep=0.25"]
    written: list[int] = []
    write = Journal.write

    def count(journal: Journal, entries) -> None:
        entries = list(entries)
        write(journal, entries)
        written.append(len(entries))
        if len(written) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", count)
    stop = 1
    assert main(asked) == 130 and not Path("answers.jsonl").exists()
    assert "the same command goes on from here" in capsys.readouterr().err
    stop = 0
    assert main(asked) == 0
    assert written[0] == 2 and sum(written) == len(QUESTIONS)
    cut = Path("answers.jsonl").read_bytes()
    assert json.loads(cut.splitlines()[0])["metadata"]["kept_image_tokens"] == 16
    Path("answers.jsonl").unlink()
    assert main(asked) == 0 and Path("answers.jsonl").read_bytes() == cut
    assert sum(written) == 2 * len(QUESTIONS)
    Path("answers.jsonl").unlink()
    stop = len(written) + 1
    assert main(asked) == 130
    stop, before = 0, sum(written)
    assert main([*asked, "--policy", "full"]) == 0 and sum(written) == before + len(QUESTIONS)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "questions.jsonl:7: Expecting"),
        ("[]", "questions.jsonl:7: not an object"),
        ('{"image": "a.png", "text": "x"}', "questions.jsonl:7: no question_id"),
        ('{"question_id": "7", "image": "a.png", "text": "x"}', ":7: question_id 7 is that of line 1 too"),
        ('{"question_id": 1, "image": "a.png", "text": " <image>\\n "}', ":7: text is empty"),
        ('{"question_id": 1, "text": "x"}', ":7: no image"),
        (
            '{"question_id": 1, "image": "c.png", "text": "x"}',
            ":7: image c.png isn't in --image-folder images",
        ),
        ('{"question_id": 1, "image": "../images/../a.png", "text": "x"}', "lies outside of --image-folder"),
        ('{"question_id": 1, "image": "/etc/passwd", "text": "x"}', "lies outside of --image-folder"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(line: str, problem: str, asked: list[str], capsys) -> None:
    """Before the checkpoint is looked for: there is none of this name."""
    with Path("questions.jsonl").open("a") as file:
        file.write(line + "\n")
    assert main([*asked, "--pretrained", "no/such/folder"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and problem in error
    assert sorted(path.name for path in Path().iterdir()) == ["images", "questions.jsonl"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--limit", "0"], "--limit 0: must be a positive integer"),
        (["--batch-size", "0"], "--batch-size 0: must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0 is not positive"),
        (["--output", "images"], "--output images: is a folder"),
        (["--policy", "fast"], "policy: unknown value 'fast'"),
        (["--pretrained", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], problem: str, asked: list[str], capsys) -> None:
    assert main([*asked, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and problem in error and not Path("answers.jsonl").exists()


def test_lines_end_at_newlines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON leaves U+2028 and U+0085 in its strings, and `str.splitlines` cuts there."""
    text = "first\u2028second\u0085third"
    picture((8, 8), 0).save(tmp_path / "a.png")
    row = {"question_id": 1, "image": "a.png", "text": text}
    (tmp_path / "q.jsonl").write_text("\n" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [one["text"] for one in read_questions(tmp_path / "q.jsonl", tmp_path)] == [text]

    chosen = [build_lvis.Conversation("1", "a.png", (("why?", text),))]
    build_lvis.write_set(tmp_path, "lvis_vqa_single", chosen, tmp_path, {})
    monkeypatch.setenv(long_answers.DATA_VARIABLE, str(tmp_path))
    assert [row["turns"] for row in long_answers.load_rows("lvis_vqa_single")] == [[("why?", text)]]
