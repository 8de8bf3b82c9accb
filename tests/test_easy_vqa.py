"""The conversion of easy-VQA: facts from questions, scenes, answers checked by a second reading."""

import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES, Tile, load_tiles, stated_facts
from dynllava_plugin.easy_vqa.scenes import DESCRIBE, DESCRIPTIONS, PLACES, describe, scene_questions
from dynllava_plugin.easy_vqa.writing import SHORT_ANSWER
from train import easy_vqa

SIZES = ["--singles", "30", "--scenes", "40", "--test_scenes", "20", "--test_descriptions", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("easy_vqa")
    assert easy_vqa.main(["--output_dir", str(target), *SIZES]) == 0
    return target


def rows(folder: Path, benchmark: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{benchmark}_test.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("questions", "facts"),
    [
        ([("what is the blue shape?", "circle")], ("blue", "circle")),
        ([("what color is the triangle?", "red")], ("red", "triangle")),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], ("red", "circle")),
        ([("is there not a red shape?", "no"), ("is a circle present?", "no")], ("red", None)),
        ([("is there not a red shape?", "yes"), ("is there a teal shape?", "no")], (None, None)),
        ([("is a circle present?", "no"), ("is no triangle present?", "yes")], (None, "rectangle")),
    ],
)
def test_facts_follow_from_the_questions(
    questions: list[tuple[str, str]], facts: tuple[str | None, str | None]
) -> None:
    assert stated_facts(questions) == facts


def test_contradictions_are_named() -> None:
    with pytest.raises(ValueError, match="contradictory"):
        stated_facts([("what color is the shape?", "red"), ("is there a red shape?", "no")])


def test_facts_agree_with_the_pixels() -> None:
    """The stated colour is the one that the object is painted in: a reading that uses no question."""
    rgb = {"black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128)}
    rgb |= {"green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0)}
    tiles = load_tiles("test")
    assert len(tiles) == 1000
    for tile in tiles:
        counts = {value: n for n, value in Image.open(tile.path).convert("RGB").getcolors(4096) or []}
        painted = max(rgb, key=lambda name: counts.get(rgb[name], 0))
        assert tile.color in (painted, None), tile.path


def truth(question: str, facts: list[tuple[str, str]]) -> str:
    """A second way to answer: by what the words of the question select."""
    words = question.rstrip("?").split()
    place = next((k for k, name in enumerate(PLACES) if question.rstrip("?").endswith(name)), None)
    seen = facts if place is None else [facts[place]]
    colors, shapes = set(words) & set(COLORS), set(words) & set(SHAPES)
    match = [f for f in seen if (not colors or f[0] in colors) and (not shapes or f[1] in shapes)]
    if words[0] == "what":
        kind = 0 if "color" in words else 1
        (answer,) = {fact[kind] for fact in match}
        assert len(match) == 1
        return answer
    return "yes" if bool(match) != bool({"not", "no"} & set(words)) else "no"


def test_scene_answers_are_true_balanced_and_hard() -> None:
    rng = random.Random(3)
    answers: list[str] = []
    kinds = set()
    for _ in range(400):
        facts = [(rng.choice(COLORS), rng.choice(SHAPES)) for _ in range(4)]
        questions = scene_questions(facts, 12, rng)
        assert len({q for q, _ in questions}) == 12
        for question, answer in questions:
            assert answer == truth(question, facts), (question, facts)
            kinds.add(re.sub("|".join((*COLORS, *SHAPES, *PLACES)), "_", question))
            if answer in ("yes", "no"):
                answers.append(answer)
    assert len(kinds) == 19  # 7 wh-questions; 4 yes/no ones about a colour, a shape or both
    assert 0.46 < answers.count("yes") / len(answers) < 0.54


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="choose 0 to 24"):
        scene_questions([("red", "circle")] * 4, 25, random.Random(0))
    assert len(scene_questions([("red", "circle")] * 4, 24, random.Random(0))) == 24


@pytest.mark.parametrize("prompt", DESCRIPTIONS)
def test_descriptions_join_all_four_facts(prompt: str) -> None:
    facts = [("red", "circle"), ("blue", "triangle"), ("teal", "rectangle"), ("black", "circle")]
    text = describe(facts, prompt)
    assert all(f"a {color} {shape}" in text for color, shape in facts)
    assert 50 <= len(re.findall(r"\w+|[.,]", text)) <= 80


def test_train_file_is_llavas_format(folder: Path) -> None:
    samples = json.loads((folder / "train.json").read_text())
    assert len(samples) == 70 and len({sample["id"] for sample in samples}) == 70
    long = 0
    for sample in samples:
        assert (folder / sample["image"]).is_file() and sample["image"].startswith("images/train/")
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert turns[0]["value"].count("<image>") == 1 == str(turns).count("<image>")
        assert turns[0]["value"].endswith(SHORT_ANSWER)
        assert all(len(turn["value"].split()) < 15 for turn in turns[1:-1])
        long += len(turns[-1]["value"].split()) >= 50
    assert 5 <= long <= 25  # about a third of 40 scenes


def test_test_sets(folder: Path) -> None:
    own, scenes, described = (rows(folder, b) for b in ("easy_vqa", "easy_vqa_scenes", "easy_vqa_describe"))
    assert (len(own), len(scenes), len(described)) == (9673, 80, 8)
    assert set(own[0]) == {"id", "image", "question", "answer"}
    assert all((folder / row["image"]).is_file() for row in own + scenes + described)
    assert {row["question"] for row in described} == {DESCRIBE}
    assert not any("<image>" in row["question"] or "\n" in row["question"] for row in own + scenes)
    with Image.open(folder / scenes[0]["image"]) as image:
        assert image.size == (128, 128)


def test_scenes_show_their_own_splits_tiles(folder: Path) -> None:
    known = {split: [t for t in load_tiles(split) if t.known] for split in ("train", "test")}
    for split in known:
        single = {Image.open(tile.path).convert("RGB").tobytes() for tile in known[split]}
        for path in sorted((folder / "images" / split).glob("scene_*.png"))[:10]:
            scene = Image.open(path)
            quarters = [scene.crop((x, y, x + 64, y + 64)) for y in (0, 64) for x in (0, 64)]
            assert all(quarter.tobytes() in single for quarter in quarters), path


def test_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    assert easy_vqa.main(["--output_dir", str(tmp_path / "again"), *SIZES]) == 0
    assert easy_vqa.main(["--output_dir", str(tmp_path / "other"), *SIZES, "--seed", "1"]) == 0
    for name in ("train.json", "easy_vqa_scenes_test.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()
    first = "images/test/scene_00000.png"
    same = ImageChops.difference(Image.open(folder / first), Image.open(tmp_path / "again" / first))
    assert same.getbbox() is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenes", "-1"], "--scenes is -1"),
        (["--questions_per_scene", "0"], "--questions_per_scene is 0"),
        (["--described", "1.5"], "--described is 1.5"),
        (["--scenes", "0", "--singles", "0"], "nothing to train on"),
        (["--test_scenes", "3"], "--test_descriptions 200 needs"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert easy_vqa.main(["--output_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_unknown_facts_stay_out_of_scenes() -> None:
    tiles = [Tile(Path("a.png"), [], "red", None), *[Tile(Path("b.png"), [], "red", "circle")] * 4]
    assert [tile.known for tile in tiles] == [False, True, True, True, True]
