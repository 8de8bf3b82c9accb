"""What VLMEvalKit's tables say is what is asked and what is scored."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import xlsxwriter
from PIL import Image
from vlmeval.smp import dump, load

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.vlmevalkit.cells import keep_cells, mend_rows
from tests.commands import VLMEVALKIT, Finished, run_command

SAID = [
    "None",
    "N/A",
    "n/a",
    "null",
    "NULL",
    "NA",
    "=3",
    "=1+1",
    "007",
    "1e5",
    "3",
    "True",
    "https://a.b/" + "c" * 3000,
]


def picture(prefix: str = "") -> str:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(content, "PNG")
    return prefix + base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize("ending", ["xlsx", "tsv", "csv"])
def test_predictions_come_back_as_they_were_said(tmp_path: Path, ending: str) -> None:
    """Twice: what is changed is put back, and may be changed again."""
    kit = SimpleNamespace(build_dataset=None)
    before = xlsxwriter.Workbook.__init__
    with Patches() as patches:
        keep_cells(patches, kit)
        assert xlsxwriter.Workbook.__init__ is not before
    assert xlsxwriter.Workbook.__init__ is before
    path = str(tmp_path / f"p.{ending}")
    frame = {"index": range(len(SAID)), "answer": SAID, "hint": ["None"] * len(SAID), "prediction": SAID}
    with Patches() as patches:
        keep_cells(patches, kit)
        dump(pd.DataFrame(frame), path)
        found = load(path)
        assert list(found["prediction"]) == SAID and list(found["answer"])[:5] == SAID[:5]
        assert found["hint"].isna().all() and list(found["index"]) == list(range(len(SAID)))
        dump(pd.DataFrame({"index": [1, 2], "prediction": ["3", ""]}), path)
        found = load(path)
        assert found["prediction"][0] == "3" and pd.isna(found["prediction"][1])


def test_rows_are_mended_and_told() -> None:
    data = pd.DataFrame(
        {
            "index": [1, 2, 2, "2"],
            "image": ["data:image/png;base64,AAAA", "BBBB", ["data:image/jpeg;base64,CCCC", "DDDD"], "EEEE"],
            "question": ["<image> and <image>, which?", "What?", "How?", "<image>\nWho?"],
        }
    )
    lines = mend_rows("Mine", data)
    assert list(data["image"]) == ["AAAA", "BBBB", ["CCCC", "DDDD"], "EEEE"]
    assert list(data["question"]) == ["and , which?", "What?", "How?", "Who?"]
    assert len(lines) == 2 and lines[0].startswith("Mine: 2 questions have a literal <image>")
    assert lines[1].startswith("Mine: 2 rows have the index of an earlier row")
    assert list(data["index"]) == [1, 2, "2-2", "2-3"]
    numbers = pd.DataFrame({"index": [5, 5, 1, 5]})
    mend_rows("Mine", numbers)
    assert list(numbers["index"]) == [5, 6, 1, 7]
    assert mend_rows("Mine", data.head(2)) == []


def run_kit(folder: Path, name: str) -> tuple[Finished, pd.DataFrame]:
    command = ["--pretrained", "tiny", "--data", name, "--max-new-tokens", "4", "--data-root", str(folder)]
    done = run_command(VLMEVALKIT, [*command, "--work-dir", str(folder / "work")], folder, PRED_FORMAT="tsv")
    found = folder / "work" / "dynllava" / f"dynllava_{name}.tsv"
    return done, pd.read_csv(
        found, sep="\t", dtype=str, keep_default_na=False
    ) if found.is_file() else pd.DataFrame()


def test_vqav2_of_an_ordinary_file_and_its_oddities(tmp_path: Path) -> None:
    """Base64 images, one with a prefix, one question with placeholders, two rows of one index; the whole command."""
    rows = {
        "index": [7, 8, 7],
        "image": [picture(), picture("data:image/png;base64,"), picture()],
        "question": ["What color is the shape?", "<image> like <image>?", "Is it a circle?"],
        "answer": [str([text] * 10) for text in ("red", "red", "no")],
    }
    pd.DataFrame(rows).to_csv(tmp_path / "VQAv2_VAL.tsv", sep="\t", index=False)
    done, found = run_kit(tmp_path, "VQAv2_VAL")
    assert done.code == 0, done.text[-3000:]
    assert len(found) == 3 and "VQAv2_VAL: 1 questions have a literal <image>" in done.text
    assert "VQAv2_VAL: 1 rows have the index of an earlier row" in done.text
    assert list(found["index"]) == ["7", "8", "9"] and len(set(found["prediction"])) > 1
    assert found["prediction"][2] in ("yes", "no") != found["prediction"][0]
    right = [said == truth for said, truth in zip(found["prediction"], ("red", "red", "no"), strict=True)]
    (score,) = read_results(tmp_path)["value"]
    assert score == pytest.approx(100 * sum(right) / 3)


def test_vqav2_of_a_file_without_images_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynllava_plugin.evaluation.vlmevalkit.datasets import VQAV2, VQAv2

    monkeypatch.setenv("LMUData", str(tmp_path))
    (tmp_path / f"{VQAV2}.tsv").write_text("index\tquestion\tanswer\n0\tWhat?\t['a']\n")
    with pytest.raises(UserError, match=r"neither a column image \(base64\) nor image_path"):
        VQAv2.load_data(VQAv2.__new__(VQAv2), VQAV2)


def test_an_option_that_says_none_is_one(tmp_path: Path) -> None:
    """What was read as missing comes back empty."""
    options = {"A": ["None", "red"], "B": ["N/A", "None"], "C": ["null", "NA"]}
    table = {
        "index": [0, 1],
        "image": [picture()] * 2,
        "question": ["What?"] * 2,
        **options,
        "answer": ["A", "B"],
    }
    pd.DataFrame(table).to_csv(tmp_path / "RealWorldQA.tsv", sep="\t", index=False)
    done, found = run_kit(tmp_path, "RealWorldQA")
    assert done.code == 0, done.text[-3000:]
    assert list(found["A"]) == options["A"] and list(found["C"]) == options["C"]
