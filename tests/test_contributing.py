"""CONTRIBUTING.md's recipes for a policy and a family, followed to the letter in a copy of the repository: its tests stay green."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "dynllava_plugin",
    "train",
    "tests",
    "eval_configs",
    "CONTRIBUTING.md",
    "pyproject.toml",
    "run_vlmevalkit.py",
)
# The tests that look at lists of policies, beside every test that the new line in `CASES` adds.
LISTS = ("every_policy_is_in_the_list", "subjects_are_policies_at_budgets", "who_reads_the_question")
FILES = ("test_policies.py", "test_policies_harnesses.py", "test_compare.py", "test_shared_prefill.py")
# Of a family: what holds it against its stock class, in every way that the model has, and its folder.
HELD = ("full_context_is_the_stock_class", "a_drawn_configuration_is_one_thing", "a_stock_folder_loads")
OF_FAMILIES = ("test_families.py", "test_matrix.py", "test_family_loading.py")


def copy_of_the_repository(folder: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def insert(path: Path, line: str, before: str) -> None:
    """Put `line` into a file, before the first `before`."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) >= 1, f"{path.name} has no {before!r}"
    path.write_text(text.replace(before, line + before, 1), encoding="utf-8")


def steps_of(folder: Path, title: str) -> tuple[list[str], list[Path]]:
    """A recipe's three numbered steps, and the file that each is about; the first isn't there yet."""
    page = (folder / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.split(r"^\d\. ", page.split(title)[1].split("\n\nNow ")[0], flags=re.MULTILINE)[1:]
    paths = [folder / step.split("`")[1] for step in steps]
    assert len(steps) == 3 and not paths[0].exists()
    return steps, paths


def code_of(step: str) -> str:
    return textwrap.dedent(" " * 3 + step.split("```python\n")[1].strip(" ").split("```")[0])


def add_the_policy(folder: Path) -> None:
    """A file, a line in the registry with its import, a line in the tests' list."""
    steps, paths = steps_of(folder, "## Adding a policy")
    paths[0].write_text(code_of(steps[0]), encoding="utf-8")
    entry = re.search(r"add `(\w+),` to `POLICIES`", steps[1])
    assert entry
    insert(
        paths[1],
        f"from dynllava_plugin.policies.{paths[0].stem} import {entry[1]}\n",
        "from dynllava_plugin.policies.",
    )
    insert(paths[1], f"        {entry[1]},\n", "    )\n}\n")
    insert(paths[2], f"    {steps[2].split('`')[3]}\n", "]\nIDS = ")


def add_the_family(folder: Path) -> None:
    """A file, its import, an entry in the tests' list."""
    steps, paths = steps_of(folder, "## Adding a model family")
    paths[0].write_text(code_of(steps[0]), encoding="utf-8")
    insert(paths[1], f"    {steps[1].split('`')[3]}\n", ")\nfrom dynllava_plugin")
    insert(paths[2], textwrap.indent(code_of(steps[2]), "    "), "}  # fmt: skip\nEVERY = ")


def test_the_recipes_leave_the_tests_green(tmp_path: Path) -> None:
    folder = copy_of_the_repository(tmp_path)
    add_the_policy(folder)
    add_the_family(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    held = " or ".join(f"({test} and vipllava)" for test in HELD)
    picked = " or ".join(("center", *LISTS, held))
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in (*FILES, *OF_FAMILIES))]
    done = subprocess.run(
        [*command, "-k", picked, "-p", "no:cacheprovider", "-vv"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    missing = [name for name in (*LISTS, "center,keep=0.25", *HELD) if name not in done.stdout]
    assert not missing, f"no test ran for {missing}"
    assert done.stdout.count("[vipllava] PASSED") == len(HELD)
