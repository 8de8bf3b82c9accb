"""easy-VQA as both harnesses read it: order, prompts, exact match, METEOR's honest name."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from dynllava_plugin.easy_vqa import facts
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.own_sets import easy_vqa, text_metrics


def test_rows_are_fixed_and_shuffled(easy_vqa_data: Path) -> None:
    rows = easy_vqa.load_rows("easy_vqa")
    assert len(rows) == 9673
    assert rows == easy_vqa.load_rows("easy_vqa")
    ids = [row["id"] for row in rows]
    assert ids != sorted(ids) and len(set(ids)) == len(ids)
    assert all(Path(row["image"]).is_file() for row in rows[:50])
    # A limit takes a fair sample: the first 400 questions come from hundreds of images.
    assert len({row["image"] for row in rows[:400]}) > 200


def test_prompts() -> None:
    assert easy_vqa.question_text("easy_vqa_scenes", "is it red?").endswith("single word or phrase.")
    assert easy_vqa.question_text("easy_vqa_describe", "Describe it.") == "Describe it."


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [("yes", 1), ("Yes.", 1), (" YES \n", 1), ("yes!", 0), ("yes it is", 0), ("", 0), ("yes. .", 0)],
)
def test_exact_match(prediction: str, hit: int) -> None:
    assert easy_vqa.exact_match(prediction, "yes") == hit


def test_bad_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNLLAVA_EASY_VQA", str(tmp_path))
    with pytest.raises(UserError, match=r"DYNLLAVA_EASY_VQA: .*easy_vqa_test\.jsonl"):
        easy_vqa.load_rows("easy_vqa")
    for name in easy_vqa.BENCHMARKS:
        (tmp_path / f"{name}_test.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(UserError, match=r"easy_vqa_test.jsonl:1: not a row"):
        easy_vqa.load_rows("easy_vqa")
    (tmp_path / "easy_vqa_test.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        easy_vqa.load_rows("easy_vqa")
    with pytest.raises(UserError, match="easy_vqb: no such easy-VQA benchmark"):
        easy_vqa.load_rows("easy_vqb")


def test_data_is_built_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNLLAVA_EASY_VQA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(easy_vqa.load_rows("easy_vqa_scenes")) == 4000
    (folder,) = (tmp_path / "dynllava").iterdir()
    assert folder.name.startswith("easy_vqa-")


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.delenv("DYNLLAVA_EASY_VQA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(facts, "distribution", missing)
    with pytest.raises(UserError, match=r"^the easy-VQA images .* run `pip install easy-vqa==1\.0`$"):
        easy_vqa.load_rows("easy_vqa")
    assert not list((tmp_path / "dynllava").iterdir())


class _OneSynonym:
    """A WordNet that knows that a carton is a box."""

    def synsets(self, word: str) -> list:
        class Lemma:
            def name(self) -> str:
                return "box"

        class Synset:
            def lemmas(self) -> list:
                return [Lemma()]

        return [Synset()] if word == "carton" else []


def test_meteor_without_synonyms_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "_wordnet", lambda: None)
    assert text_metrics.meteor_name() == "meteor_exact_stem"
    reference = "There is a red box. The circles are blue."
    assert text_metrics.meteor(reference, reference) > 0.99
    stems = text_metrics.meteor(reference, "There is a red box. The circle are blue.")
    assert stems > 0.99  # "circle" and "circles" share a stem
    without = text_metrics.meteor(reference, "There is a red carton. The circles are blue.")
    monkeypatch.setattr(text_metrics, "_wordnet", _OneSynonym)
    assert text_metrics.meteor_name() == "meteor"
    assert text_metrics.meteor(reference, "There is a red carton. The circles are blue.") > without + 0.05
    assert text_metrics.meteor(reference, "") == 0.0


def test_meteor_tokenizes_as_the_paper() -> None:
    words = text_metrics._tokenizer()("The left one is red. The right one isn't.")
    assert words == ["The", "left", "one", "is", "red", ".", "The", "right", "one", "is", "n't", "."]
