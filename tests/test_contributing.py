"""CONTRIBUTING.md's recipe for a policy, followed to the letter in a copy of the repository: its tests stay green."""

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


def follow_the_page(folder: Path) -> None:
    """The page's three numbered steps: a file, a line in the registry with its import, a line in the tests' list."""
    page = (folder / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.split(r"^\d\. ", page.split("## Adding a policy")[1].split("\n\nNow ")[0], flags=re.MULTILINE)[
        1:
    ]
    paths = [folder / step.split("`")[1] for step in steps]
    assert len(steps) == 3 and not paths[0].exists()
    code = textwrap.dedent(" " * 3 + steps[0].split("```python\n")[1].strip(" ").split("```")[0])
    paths[0].write_text(code, encoding="utf-8")
    entry = re.search(r"add `(\w+),` to `POLICIES`", steps[1])
    assert entry
    insert(
        paths[1],
        f"from dynllava_plugin.policies.{paths[0].stem} import {entry[1]}\n",
        "from dynllava_plugin.policies.",
    )
    insert(paths[1], f"        {entry[1]},\n", "    )\n}\n")
    insert(paths[2], f"    {steps[2].split('`')[3]}\n", "]\nIDS = ")


def test_the_recipe_leaves_the_tests_green(tmp_path: Path) -> None:
    folder = copy_of_the_repository(tmp_path)
    follow_the_page(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    picked = " or ".join(("center", *LISTS))
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in FILES)]
    done = subprocess.run(
        [*command, "-k", picked, "-p", "no:cacheprovider", "-vv"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    missing = [name for name in (*LISTS, "center,keep=0.25") if name not in done.stdout]
    assert not missing, f"no test ran for {missing}"
