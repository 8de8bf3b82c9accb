"""How many files of the package a trip through it crosses: `python -m tests.trips` prints them, in the order of entry."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image

import dynllava_plugin

PACKAGE = Path(dynllava_plugin.__file__).parent
FILES = Path(__file__).parent / "harness_files"
# House rule: a reader who follows one of these opens no more files.
LIMITS = {"engine question": 20, "prefill": 13, "decode step": 12, "results to table": 3}


def trace(call: Callable[[], Any]) -> dict[str, int]:
    """Return the package's files whose functions ran in `call`, in order of entry, each with how many did."""
    found: dict[str, set[str]] = {}

    def enter(frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if (
            event == "call"
            and path.startswith(str(PACKAGE))
            and not frame.f_code.co_name.startswith("<module")
        ):
            found.setdefault(str(Path(path).relative_to(PACKAGE)), set()).add(frame.f_code.co_qualname)

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {path: len(functions) for path, functions in found.items()}


def trips() -> dict[str, dict[str, int]]:
    """Return what `trace` finds on each of `LIMITS`' trips, of the bundled model on a CPU, every module imported before."""
    from dynllava_plugin.evaluation.engine.engine import Engine
    from dynllava_plugin.evaluation.engine.prompting import VICUNA
    from dynllava_plugin.evaluation.engine.requests import Generation, Request
    from dynllava_plugin.evaluation.results.results import read_results
    from dynllava_plugin.evaluation.results.tables import render
    from dynllava_plugin.evaluation.settings import ModelSettings

    engine = Engine.load(ModelSettings("tiny", device="cpu"), batch_size=1)
    model, processor = engine.model, engine.processor
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "red.png"
        Image.new("RGB", (64, 48), "red").save(picture)
        request = Request(VICUNA.prompt([("What color?", None)], 1, "sample"), (str(picture),), "sample", "")
        short = Generation.from_task({"max_new_tokens": 3})
        inputs = processor(
            text="USER: <image>\nWhat color? ASSISTANT:", images=Image.open(picture), return_tensors="pt"
        )
        with torch.inference_mode():
            first = model(**inputs, use_cache=True)
            step = torch.tensor([[5]])
            calls: dict[str, Callable[[], Any]] = {
                "engine question": lambda: engine.generate([request], short),
                "prefill": lambda: model(**inputs, use_cache=True),
                "decode step": lambda: model(
                    input_ids=step, past_key_values=first.past_key_values, use_cache=True
                ),
                "results to table": lambda: render(read_results(FILES), "markdown"),
            }
            calls["results to table"]()
            return {name: trace(call) for name, call in calls.items()}


if __name__ == "__main__":
    for name, found in trips().items():
        print(f"{name}: {len(found)} files (at most {LIMITS[name]}), {sum(found.values())} functions")
        for path, functions in found.items():
            print(f"  {functions:3} {path}")
