"""What is imported when: nothing heavy for help and misspelt names, our families once transformers reads a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import dynllava_plugin
from dynllava_plugin.cli import main
from dynllava_plugin.evaluation.settings import ModelSettings
from tests.families.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DYNLLAVA = [sys.executable, "-m", "dynllava_plugin.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
HEAVY = {"torch", "transformers", "numpy", "pandas", "matplotlib", "PIL", "lmms_eval", "vlmeval", "datasets"}
MISSPELT = {
    "evel suite.yaml": "did you mean eval",
    "eval suite.yaml --pretraned tiny": "--pretraned: no such option; did you mean --pretrained",
    "table results --format mardown": "did you mean markdown?",
    "bench trian": "did you mean train?",
    "bench decode --new-token=3 --repeat 4 --bath 1": "--bath: no such option; did you mean --batch",
    "compare --polices fastv": "--polices: no such option; did you mean --policies",
    "show a.png What --polcy fastv": "--polcy: no such option; did you mean --policy?",
}

# Commands one after the other: what each printed, its exit status and what heavy modules are there behind it.
COMMANDS = """
import contextlib, io, json, sys
from dynllava_plugin.cli import main

heavy, commands = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])
found = {}
for command in commands:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main(command.split())
        except SystemExit as left:
            status = left.code or 0
    imported = sorted(heavy & {name.partition(".")[0] for name in sys.modules})
    found[command] = [printed.getvalue(), status, imported]
print(json.dumps(found))
"""

# The first reading of a checkpoint by each auto class, in processes forked from one in which nobody has read one yet.
AUTO_CLASSES = """
import os, sys
first, *folders = sys.argv[1:]
if first == "ours":
    import dynllava_plugin
from dynllava_plugin.evaluation.settings import ModelSettings
import transformers
if first == "transformers":
    import dynllava_plugin
from dynllava_plugin.evaluation.settings import ModelSettings
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
import transformers.models.internvl.modeling_internvl, transformers.models.llava.modeling_llava
import dynllava_plugin
from dynllava_plugin.evaluation.settings import ModelSettings

assert not any(name.startswith("dynllava_plugin.model") for name in sys.modules)
calls = {
    "config": AutoConfig.from_pretrained,
    "config by name": lambda folder: AutoConfig.for_model("dynamic_" + os.path.basename(folder)),
    "model": AutoModelForImageTextToText.from_pretrained,
    "processor": AutoProcessor.from_pretrained,
    "pipeline": lambda folder: pipeline("image-text-to-text", model=folder).model,
}
for name, call in calls.items():
    child = os.fork()
    if not child:
        try:
            print(name, *(type(call(folder)).__name__ for folder in folders), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def python(code: str, *arguments: str) -> str:
    """What a process of its own prints; it must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*commands: str) -> dict[str, Any]:
    """What each command line of `dynllava` printed, its exit status and the heavy modules imported by then."""
    return json.loads(python(COMMANDS, json.dumps(sorted(HEAVY)), json.dumps(commands)))


def choices(printed: str) -> list[str]:
    """What argparse lists behind a wrong choice."""
    return [name.strip(" '") for name in printed.partition("(choose from ")[2].partition(")")[0].split(",")]


def test_help_needs_no_heavy_module() -> None:
    wrong = run("?", "bench ?")
    names, phases = choices(wrong["?"][0]), choices(wrong["bench ?"][0])
    assert {"eval", "bench", "version"} < set(names) and {"prefill", "train", "harness"} < set(phases)
    helps = ["", *names, *(f"bench {phase}" for phase in phases)]
    for command, (printed, status, imported) in run(*(f"{name} --help".strip() for name in helps)).items():
        assert status == 0 and printed.startswith("usage: dynllava") and not imported, command


def test_misspelt_names_need_none_either_and_the_nearest_are_named() -> None:
    for command, (printed, status, imported) in run(*MISSPELT).items():
        assert status == 2 and MISSPELT[command] in printed and not imported, (command, printed, imported)


def test_versions_need_none() -> None:
    printed, status, imported = run("version")["version"]
    assert status == 0 and not imported
    assert {"python", "torch", "transformers"} <= {line.split()[0] for line in printed.splitlines()}


def test_what_a_caller_waits_for(capsys: pytest.CaptureFixture) -> None:
    seconds = {}
    for name, code in {
        "argparse": "import argparse",
        "dynllava --help": "from dynllava_plugin.cli import main; main(['--help'])",
    }.items():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        seconds[name] = time.perf_counter() - start
    with capsys.disabled():  # told, not asserted: another machine is as slow as it is
        print("\n" + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), end=" ")


def test_lmms_evals_help_ends_with_our_model_arguments() -> None:
    code = "import sys; from dynllava_plugin.evaluation.lmms_eval.command import main; main()"
    theirs, _, ours = python(code, "--help").partition("--model_args of --model dynllava")
    assert "usage: lmms-eval" in theirs
    assert [line.split()[0] for line in ours.splitlines()[1:]] == [
        setting.name for setting in fields(ModelSettings)
    ]
    assert {"pretrained", "policy", "quantization"} <= {line.split()[0] for line in ours.splitlines()[1:]}
    assert "--model_args" not in python(code, "tasks", "--help")


def test_names_are_imported_at_first_use() -> None:
    code = (
        f"import sys, dynllava_plugin; assert not {HEAVY!r} & set(sys.modules); print(*dir(dynllava_plugin))"
    )
    assert set(dynllava_plugin.__all__) < set(python(code).split())
    for name in dynllava_plugin.__all__:
        assert getattr(dynllava_plugin, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lod_model'"):
        dynllava_plugin.lod_model  # noqa: B018


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `save_pretrained` writes of two families; each folder has its family's name."""
    folder = tmp_path_factory.mktemp("own")
    for name, source in {"llava": "tiny", "internvl": write_checkpoint("internvl", folder / "stock")}.items():
        for part in dynllava_plugin.load_model(source, device="cpu"):
            part.save_pretrained(folder / name)
    return [str(folder / "llava"), str(folder / "internvl")]


@pytest.mark.parametrize("first", ["ours", "transformers", "auto classes"])
def test_auto_classes_read_own_checkpoints(first: str, folders: list[str]) -> None:
    configs = "DynamicLlavaConfig DynamicInternVLConfig"
    models = "DynamicLlavaForConditionalGeneration DynamicInternVLForConditionalGeneration"
    assert python(AUTO_CLASSES, first, *folders).splitlines() == [
        f"config {configs}",
        f"config by name {configs}",
        f"model {models}",
        "processor DynamicLlavaProcessor InternVLProcessor",
        f"pipeline {models}",
    ]


def test_without_this_package_transformers_does_not_know_them(folders: list[str]) -> None:
    code = """
import sys
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""
    assert "does not recognize this architecture" in python(code, folders[0])


def test_importing_the_training_says_nothing() -> None:
    """What imports it, as `train/budgets.py`, begins without lines about kernels that nothing here uses."""
    code = [sys.executable, "-c", "import train.finetune"]
    done = subprocess.run(code, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    "typed",
    [
        [*DYNLLAVA, "compare", "--output", "out", "--limit", "1"],
        [*DYNLLAVA, "serve", "tiny", "--port", "0"],
        [sys.executable, "-m", "dynllava_plugin.evaluation.lmms_eval.command", "--model", "dynllava", "--tasks", "easy_vqa"],
        [sys.executable, str(ROOT / "run_vlmevalkit.py"), "--pretrained", "tiny", "--data", "EasyVQA"],
        [sys.executable, str(ROOT / "train" / "finetune.py"), str(ROOT / "train" / "configs" / "tiny.yaml"), "--output_dir", "out"],
    ],
    ids=["compare", "serve", "lmms_eval", "run_vlmevalkit", "finetune"],
)  # fmt: skip
def test_ctrl_c_while_a_command_starts_is_one_line(typed: list[str], tmp_path: Path) -> None:
    # As in a terminal: what a shell starts in the background ignores the signal, and so would all it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = subprocess.Popen(
        typed, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    maps, late = Path(f"/proc/{command.pid}/maps"), time.monotonic() + 30
    # Until torch, or what needs it, is being imported.
    while "torch" not in maps.read_text() and time.monotonic() < late:
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    _, error = command.communicate(timeout=60)
    assert command.returncode in (-signal.SIGINT, 130)
    assert error.splitlines() == ["stopped"]


def test_a_reader_that_has_enough_ends_a_command_well(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [*DYNLLAVA, "benchmarks"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == "" and command.wait(60) == 0


@pytest.mark.parametrize(
    ("typed", "package"),
    [
        ("compare --output out --limit 1", "lmms_eval"),
        ("eval easy_vqa --pretrained tiny --output out --limit 1", "vlmeval"),
        ("serve tiny --port 0", "uvicorn"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_done(
    typed: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(typed.split()) == 2
    assert f"{package} not installed; pip install 'dynllava-plugin[" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
