"""What VLMEvalKit's tables say is what is asked and what is scored."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.vlmevalkit.cells import mend_rows

ROOT = Path(__file__).resolve().parents[1]
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
    """In a process of its own, twice: what is changed is put back, and may be changed again."""
    code = f"""
import types, xlsxwriter
kit = types.SimpleNamespace(build_dataset=None)
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.vlmevalkit.cells import keep_cells
before = xlsxwriter.Workbook.__init__
with Patches() as patches:
    keep_cells(patches, kit)
assert xlsxwriter.Workbook.__init__ is before
keep_cells(Patches(), kit)
import pandas as pd
from vlmeval.smp import dump, load
said = {SAID!r}
path = {str(tmp_path / ("p." + ending))!r}
frame = pd.DataFrame({{"index": range(len(said)), "answer": said, "hint": ["None"] * len(said), "prediction": said}})
dump(frame, path)
found = load(path)
assert list(found["prediction"]) == said, list(found["prediction"])
assert list(found["answer"])[:5] == said[:5], list(found["answer"])
assert found["hint"].isna().all() and list(found["index"]) == list(range(len(said)))
dump(pd.DataFrame({{"index": [1, 2], "prediction": ["3", ""]}}), path)
found = load(path)
assert found["prediction"][0] == "3" and pd.isna(found["prediction"][1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


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


def run_kit(folder: Path, name: str, *flags: str) -> tuple[subprocess.CompletedProcess[str], pd.DataFrame]:
    command = [sys.executable, str(ROOT / "run_vlmevalkit.py"), "--pretrained", "tiny", "--data", name]
    command += [
        "--max-new-tokens",
        "4",
        "--data-root",
        str(folder),
        "--work-dir",
        str(folder / "work"),
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PRED_FORMAT": "tsv"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
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
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(found) == 3 and "VQAv2_VAL: 1 questions have a literal <image>" in done.stderr
    assert "VQAv2_VAL: 1 rows have the index of an earlier row" in done.stderr
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
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(found["A"]) == options["A"] and list(found["C"]) == options["C"]
