"""The built wheel, unpacked where no checkout can be reached: what is in it, and that its commands run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dynllava_plugin.evaluation.own_sets.easy_vqa import DATA_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SUITES = "dynllava_plugin/evaluation/suites"

# Python runs this at start. The tests' own environment has the checkout on its path (an editable install): not here.
HIDE_CHECKOUT = """
import os, sys
sys.path[:] = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, "train"))]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` would make, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), *build], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("dynllava_plugin-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content alone, as an installation's `site-packages`."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *arguments: str, **environment: str) -> str:
    """What `python` with `arguments` prints where only the installed package is, with `folder` as its own."""
    start = folder / "start"
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(HIDE_CHECKOUT)
    given = {
        **os.environ,
        "PYTHONPATH": f"{installed}:{start}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env={**given, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dynllava(installed: Path, folder: Path, *arguments: str, **environment: str) -> str:
    return run(installed, folder, "-m", "dynllava_plugin.cli", *arguments, **environment)


def test_nothing_but_the_package_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in content}
    assert len(tops) == 2 and "dynllava_plugin" in tops
    assert all(top == "dynllava_plugin" or top.endswith(".dist-info") for top in tops)
    package = ROOT / "dynllava_plugin"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    suites = {f"{SUITES}/{path.name}" for path in (ROOT / "eval_configs").glob("*.yaml")}
    wanted = {name for name in files if "__pycache__" not in name} | suites
    assert {name for name in content if name.startswith("dynllava_plugin/")} == wanted
    for data in (
        "assets/tiny_llava/model.safetensors",
        "bench/paper_efficiency.csv",
        "evaluation/results/data/paper_results.csv",
        "evaluation/suites/understanding.yaml",
        "evaluation/lmms_eval/task_files/easy_vqa/easy_vqa.yaml",
    ):
        assert f"dynllava_plugin/{data}" in wanted


def test_the_package_that_runs_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import dynllava_plugin, importlib.util; print(dynllava_plugin.__file__, importlib.util.find_spec('train'))"
    assert run(installed, tmp_path, "-c", code).split() == [
        f"{installed}/dynllava_plugin/__init__.py",
        "None",
    ]


def test_commands_answer(installed: Path, tmp_path: Path) -> None:
    printed = dynllava(installed, tmp_path, "--help")
    assert all(name in printed for name in ("usage: dynllava", "bench", "compare", "show", "eval", "table"))
    code = "from dynllava_plugin.cli import main; main(['version']); main(['benchmarks']); main(['bench', '--help'])"
    printed = run(installed, tmp_path, "-c", code)
    assert all(text in printed for text in ("transformers ", "MMBench", "usage: dynllava bench"))


def test_show_draws_a_picture_and_its_page(installed: Path, tmp_path: Path) -> None:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
    picture.save(tmp_path / "circle.png")
    question = ["circle.png", "What color is the shape?", "--pretrained", "tiny"]
    dynllava(installed, tmp_path, "show", *question, "--output", "kept.png")
    assert "<html" in (tmp_path / "kept.html").read_text(encoding="utf-8")


def test_a_packaged_suite_runs_in_lmms_eval(installed: Path, tmp_path: Path, easy_vqa_folder: Path) -> None:
    """The suite starts lmms-eval's command as a child, which finds our model and tasks in the wheel."""
    flags = ["--pretrained", "tiny", "--harness", "lmms-eval", "--benchmarks", "easy_vqa", "--limit", "2"]
    data = {DATA_VARIABLE: str(easy_vqa_folder)}
    printed = dynllava(installed, tmp_path, "eval", "easy_vqa", *flags, "--output", "out", **data)
    assert "1 run into out" in printed
    table = (tmp_path / "out" / "table.csv").read_text(encoding="utf-8")
    assert "easy_vqa" in table and "lmms-eval" in table


def test_lmms_eval_knows_the_model(installed: Path, tmp_path: Path, easy_vqa_folder: Path) -> None:
    flags = ["--model", "dynllava", "--model_args", "pretrained=tiny", "--tasks", "easy_vqa", "--limit", "2"]
    module = "dynllava_plugin.evaluation.lmms_eval.command"
    printed = run(installed, tmp_path, "-m", module, *flags, **{DATA_VARIABLE: str(easy_vqa_folder)})
    assert "|easy_vqa" in printed.replace(" ", "")
