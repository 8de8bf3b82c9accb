"""`dynllava build-lvis`: the paper's rules, the same set every time, broken entries counted and named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.own_sets.build_lvis import (
    MULTI,
    SHAREGPT4V,
    SINGLE,
    Conversation,
    read_conversations,
    select,
)
from dynllava_plugin.evaluation.own_sets.long_answers import find_image, load_rows


def talk(name: str, image: str, words: list[int]) -> dict[str, Any]:
    """A conversation in LLaVA's format with answers of so many words."""
    messages = []
    for place, count in enumerate(words):
        question = f"<image>\nquestion {place}?" if place == 0 else f"question {place}?"
        messages += [
            {"from": "human", "value": question},
            {"from": "gpt", "value": " ".join(["word"] * count)},
        ]
    return {"id": name, "image": image, "conversations": messages}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    images = tmp_path / "coco" / "train2017"
    images.mkdir(parents=True)
    entries: list[Any] = [
        talk("exactly 100", "coco/train2017/a.jpg", [100]),
        talk("over 100", "coco/train2017/b.jpg", [101]),
        talk("two rounds", "coco/train2017/c.jpg", [90, 90]),
        talk("in the mixture", "coco/train2017/mixed.jpg", [200]),
        talk("no file", "coco/train2017/gone.jpg", [200]),
        talk("seven", "coco/train2017/d.jpg", [100] * 7),
        talk("eight", "coco/train2017/e.jpg", [40] * 8),
        talk("eight short", "coco/train2017/f.jpg", [37] * 8),
        *(talk(f"more {i}", "coco/train2017/b.jpg", [120 + i]) for i in range(6)),
        {"id": "x1", "image": "coco/train2017/a.jpg", "conversations": [{"from": "human", "value": "?"}]},
        {"id": "x2", "conversations": []},
        {"id": "x3", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "?"}] * 2},
        {"id": "x4", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\n "}] * 2},
        ["x5"],
        None,
    ]
    for name in ("a", "b", "c", "d", "e", "f", "mixed"):
        (images / f"{name}.jpg").write_bytes(b"jpg")
    (tmp_path / "instruct.json").write_text(json.dumps(entries))
    mixture = [{"image": ["other/folder/mixed.jpg", "second.jpg"]}, {"id": "text only"}, {"image": None}]
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    captions = [talk("long", "sam/images/a.jpg", [300]), talk("short", "sam/images/b.jpg", [299])]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def build(files: Path, *flags: str) -> int:
    command = ["build-lvis", "--exclude", str(files / "mixture.json"), "--output", str(files / "sets")]
    return main([*command, "--images", str(files / "coco" / "train2017"), *flags])


def test_rules_counts_and_files(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    instruct, captions = str(files / "instruct.json"), str(files / "captions.json")
    assert build(files, "--instruct", instruct, "--sharegpt4v", captions, "--size", "3") == 0
    out = capsys.readouterr().out
    assert "6 broken entries left out" in out and "entry 14 (id x1): 'conversations' must alternate" in out
    assert "(id x2)" in out and "and 1 more" in out and "x3" in out and "'human'" in out
    counts = [int(line.split()[0]) for line in out.splitlines() if line.startswith("   ")]
    assert counts == [14, 10, 9, 8, 7, 3, 14, 2, 1, 1, 1, 2, 2, 1, 1, 1]
    monkeypatch.setenv("DYNLLAVA_GENERATION", str(files / "sets"))
    single, multi = load_rows("lvis_vqa_single"), load_rows("lvis_vqa_multi")
    assert len(single) == 3 and {row["id"] for row in single} <= {
        "over 100",
        *(f"more {i}" for i in range(6)),
    }
    assert [row["id"] for row in multi] == ["eight"] and len(multi[0]["turns"]) == 8
    assert multi[0]["turns"][0][0] == "question 0?" and Path(multi[0]["image"]).name == "e.jpg"
    assert [row["id"] for row in load_rows("sharegpt4v_vqa")] == ["long"]
    facts = json.loads((files / "sets" / "lvis_vqa_single.json").read_text())
    assert facts["samples"] == 3 and not Path(facts["images"]).is_absolute()


def test_moved_images(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(files, "--instruct", str(files / "instruct.json"))
    monkeypatch.setenv("DYNLLAVA_GENERATION", str(files / "sets"))
    (files / "coco" / "train2017").rename(files / "elsewhere")
    with pytest.raises(
        UserError, match=r"image coco/train2017/.*\.jpg isn't in .*; give its folder with --images"
    ):
        load_rows("lvis_vqa_multi")
    monkeypatch.setenv("DYNLLAVA_IMAGES", str(files / "elsewhere"))
    assert Path(load_rows("lvis_vqa_multi")[0]["image"]).parent.name == "elsewhere"


def test_an_image_is_found_below_any_of_its_folders(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "a.jpg").touch()
    for root in (tmp_path, tmp_path / "train2017"):
        assert find_image(root, "coco/train2017/a.jpg") == tmp_path / "train2017" / "a.jpg"
    assert find_image(tmp_path, "coco/val2017/a.jpg") is None


@given(
    shapes=st.lists(st.lists(st.integers(1, 130), min_size=1, max_size=10), max_size=40),
    excluded=st.sets(st.integers(0, 9)),
    seed=st.integers(0, 99),
    size=st.integers(1, 6),
)
def test_selection_is_what_the_rules_say_whatever_the_order(
    shapes: list[list[int]], excluded: set[int], seed: int, size: int
) -> None:
    items = [
        Conversation(str(n), f"x/{n % 10}.jpg", tuple(("q", " ".join(["w"] * count)) for count in counts))
        for n, counts in enumerate(shapes)
    ]
    names = {f"{n}.jpg" for n in excluded}
    for rules, wanted in (
        (SINGLE, lambda counts: len(counts) == 1 and counts[0] > 100),
        (MULTI, lambda counts: len(counts) >= 8 and sum(counts) >= 301),
        (SHAREGPT4V, lambda counts: len(counts) == 1 and counts[0] >= 300),
    ):
        allowed = {str(n) for n, c in enumerate(shapes) if wanted(c) and n % 10 not in excluded}
        chosen, counts = select(items, rules, names, None, seed, size)
        assert {item.id for item in chosen} <= allowed and len(chosen) == min(size, len(allowed))
        assert counts[3][1] == len(allowed)
        shuffled = random.Random(seed).sample(items, len(items))
        assert select(shuffled, rules, names, None, seed, size)[0] == chosen


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "give --instruct, --sharegpt4v, or both"),
        (["--instruct", "nowhere.json"], "nowhere.json: no such file"),
        (["--instruct", "mixture.json", "--size", "0"], "--size 0: must be positive"),
        (["--instruct", "broken.json"], "broken.json: not a JSON file ("),
        (["--sharegpt4v", "object.json"], "object.json: LLaVA's format is a JSON list of samples"),
        (["--instruct", "captions.json"], "lvis_vqa_multi: no conversation of"),
    ],
)
def test_bad_input_is_one_line(
    files: Path, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "broken.json").write_text("[{")
    (files / "object.json").write_text("{}")
    flags = [str(files / flag) if flag.endswith(".json") else flag for flag in flags]
    assert build(files, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


def test_the_output_place_is_looked_at_before_the_work(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "sets").touch()
    instruct = files / "instruct.json"
    instruct.write_text("[{")  # would be named, were it read
    assert build(files, "--instruct", str(instruct)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {files / 'sets'}: can't be written") and error.count("\n") == 1


@pytest.mark.parametrize("image", ["../outside.jpg", "{root}/coco/outside.jpg", "link.jpg"])
def test_images_outside_of_their_folder_are_refused(
    files: Path, capsys: pytest.CaptureFixture[str], image: str
) -> None:
    outside = files / "coco" / "outside.jpg"
    outside.write_bytes(b"jpg")
    (files / "coco" / "train2017" / "link.jpg").symlink_to(outside)
    image = image.format(root=files)
    entries = [talk("odd", image, [150]), talk("eight", "e.jpg", [40] * 8)]
    (files / "instruct.json").write_text(json.dumps(entries))
    flags = ["--instruct", str(files / "instruct.json")]
    assert build(files, *flags) == 2
    error = capsys.readouterr().err
    assert f"{image} lies outside of it" in error and "--allow_outside" in error and error.count("\n") == 1
    assert not (files / "sets").exists()
    assert build(files, *flags, "--allow_outside") == 0


def test_an_empty_set_stops_no_other(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = str(files / "captions.json")
    assert build(files, "--instruct", captions, "--sharegpt4v", captions) == 2
    assert "the other sets are written" in capsys.readouterr().err
    assert {path.stem for path in (files / "sets").glob("*.jsonl")} == {"lvis_vqa_single", "sharegpt4v_vqa"}


def test_unbuilt_and_foreign_sets(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNLLAVA_GENERATION", str(files / "sets"))
    with pytest.raises(UserError, match=r"lvis_vqa_single.jsonl: no such file; build it with"):
        load_rows("lvis_vqa_single")
    build(files, "--instruct", str(files / "instruct.json"))
    (files / "sets" / "lvis_vqa_single.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"lvis_vqa_single.jsonl:1: not a row of build-lvis"):
        load_rows("lvis_vqa_single")
    (files / "unwritable").touch()
    with pytest.raises(UserError, match="can't be written"):
        from dynllava_plugin.evaluation.own_sets.build_lvis import write_set

        items, _ = read_conversations(files / "captions.json")
        write_set(files / "unwritable", "lvis_vqa_single", items, None, {})
