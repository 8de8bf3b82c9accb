"""Each entry point called in this process, and what it left: exit status, lines, files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tests.campaign import inputs
from tests.campaign.cases import Case

RESULTS = Path(__file__).parents[1] / "harness_files"
SECONDS = 60  # what takes longer hangs, or does the work before it finds the fault
TYPES: dict[str, Callable[[str], Any]] = {
    "prefill_chunk_size": int,
    "prompt_lookup_num_tokens": int,
    "max_new_tokens": int,
}


@dataclass
class Outcome:
    """What a case came to: exit status (an error of the API is 2), standard error, and whether an exception escaped."""

    status: int
    text: str
    escaped: str | None = None

    def fault(self, case: Case) -> str | None:
        """What is wrong with it, or None."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()]
        if self.escaped:
            return f"{self.escaped}"
        if self.status == 0:
            return "accepted"
        if self.status != 2:
            return f"status {self.status}: {' / '.join(lines[-2:])}"
        if "Traceback" in self.text:
            return "traceback"
        errors = [line for line in lines if "error: " in line]
        if len(errors) != 1 or errors[0] != lines[-1]:
            return f"{len(errors)} error lines: {' / '.join(lines[-3:])}"
        if not any(name.lower() in errors[0].lower() for name in case.named):
            return f"doesn't name {' or '.join(case.named)}: {errors[0]}"
        return None


def prepare(folder: Path) -> None:
    """Write every bad input below `folder`."""
    inputs.images(folder / "images")
    for name, (make, _) in inputs.CHECKPOINTS.items():
        make(folder / "checkpoints" / name)
    for name, content in {"garbage.json": "{ not json", "garbage.yaml": "a: [", "list.yaml": "- 1\n", "object.json": '{"a": 1}',
                          "empty.json": "", "nothing.json": "[]", "unknown-key.yaml": "benchmarkz: [gqa]\n"}.items():  # fmt: skip
        inputs.write(folder / name, content)
    sample = {
        "id": "a",
        "image": "good.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
    }
    inputs.write(folder / "data.json", json.dumps([sample] * 8))
    lvis = {**sample, "image": "coco/train2017/good.png"}
    inputs.write(folder / "lvis.json", json.dumps([lvis] * 2))
    (folder / "nothing-ran").mkdir()
    shutil.copytree(RESULTS, folder / "results")
    (folder / "loop").symlink_to(folder / "loop")


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in `folder`, which holds `prepare`'s files."""
    typed = [part.replace("@", str(folder)) for part in case.typed]
    call = API.get(case.entry) or _COMMANDS.get(case.entry) or _dynllava(case.entry)
    said, environment = io.StringIO(), dict(os.environ)
    argv, place = sys.argv, Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), _bounded():
            try:
                status = call(typed)
            except SystemExit as left:
                status = left.code if isinstance(left.code, int) else int(left.code is not None)
        return Outcome(status or 0, said.getvalue())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(1, said.getvalue(), f"{type(error).__name__}: {error}"[:300])
    finally:
        sys.argv = argv
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)


class Hangs(BaseException):
    """A case that took longer than `SECONDS`."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _dynllava(entry: str) -> Callable[[list[str]], int]:
    from dynllava_plugin.cli import main

    return lambda typed: main([*([] if entry == "dynllava" else entry.split()), *typed])


def _lmms_eval(typed: list[str]) -> int:
    from dynllava_plugin.evaluation.lmms_eval.command import main

    sys.argv = ["lmms_eval", *typed]
    main()
    return 0


def _vlmevalkit(typed: list[str]) -> int:
    from dynllava_plugin.evaluation.vlmevalkit.command import main

    return main(typed)


def _finetune(typed: list[str]) -> int:
    from train.finetune import main

    return main(typed)


_COMMANDS = {"lmms_eval": _lmms_eval, "run_vlmevalkit": _vlmevalkit, "finetune": _finetune}


@lru_cache(maxsize=1)
def _tiny() -> tuple[Any, Any]:
    from dynllava_plugin import load_model

    return load_model("tiny", device="cpu")


def _values(typed: list[str]) -> dict[str, Any]:
    """``name=value`` as a caller in Python would write it: a number where it is one."""
    values: dict[str, Any] = {}
    for part in typed:
        name, _, value = part.partition("=")
        for kind in (int, float, str):
            with contextlib.suppress(ValueError):
                values[name] = kind(value)
                break
    return values


def _api(call: Callable[[list[str]], Any]) -> Callable[[list[str]], int]:
    """What raises an error for callers: a ValueError or TypeError of one line is the API's word for refused."""

    def run(typed: list[str]) -> int:
        try:
            call(typed)
        except (ValueError, TypeError, OSError) as error:
            if isinstance(error, UnicodeError) or type(error).__name__ == "JSONDecodeError":
                raise
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def _load(typed: list[str]) -> None:
    from dynllava_plugin import load_model

    load_model(typed[0], **{"device": "cpu", **_values(typed[1:])})


def _set(typed: list[str]) -> None:
    model = _tiny()[0]
    before = model.config.sparsity
    try:
        model.set_sparsity(**_values(typed))
    finally:
        model.config.text_config.sparsity = before


def _config(typed: list[str]) -> None:
    from dynllava_plugin import SparsityConfig

    SparsityConfig(**_values(typed))


def _explain(typed: list[str]) -> None:
    from dynllava_plugin import explain

    explain(*_tiny(), typed[0], "what?", 2)


def _generate(typed: list[str]) -> None:
    model, processor = _tiny()
    given = _values(typed)
    count = given.pop("images", 1)
    inputs = dict(processor(text="USER: <image>\nwhat? ASSISTANT:", images=_picture(), return_tensors="pt"))
    if count == 0:
        del inputs["pixel_values"]
    if count == 2:
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    if given.pop("videos", 0):
        inputs["pixel_values_videos"] = inputs["pixel_values"]
    if given.pop("hidden", 0):
        model(**inputs, output_hidden_states=True)
    else:
        model.generate(**inputs, **{"max_new_tokens": 2, **given})


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (32, 32), "red")


API = {
    "load_model": _api(_load),
    "set_sparsity": _api(_set),
    "SparsityConfig": _api(_config),
    "explain": _api(_explain),
    "generate": _api(_generate),
}
