"""Loading a checkpoint against reading its bytes with safetensors alone, each in processes of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from dynllava_plugin import load_model
from dynllava_plugin.bench.process import in_a_process, peak_above
from dynllava_plugin.bench.run import Run
from dynllava_plugin.bench.timing import summary
from dynllava_plugin.errors import UserError

READ, LOAD = "safetensors", "load_model"


def load(run: Run) -> None:
    """Time `load_model` of the shape's checkpoint, and its memory, until every weight has been read once."""
    if run.rows.has({"phase": "load", "path": path} for path in ("cold", "warm")):
        return
    subject = run.subject
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if subject.weight_bytes * 1.1 > free:
        raise UserError(
            f"load: needs {subject.weight_bytes / 2**30:.1f} GiB in {place}, which has {free / 2**30:.1f} GiB free; set TMPDIR"
        )
    loaded = subject.loaded
    processor = loaded.processor if loaded else load_model("tiny", device="cpu", mode="full")[1]
    with tempfile.TemporaryDirectory(prefix="dynllava-bench-") as name:
        folder = Path(name)
        subject.model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in ("cold", "warm"):
            found: dict[str, list[tuple[float, int]]] = {READ: [], LOAD: []}
            for _ in range(max(run.repeats // 2, 2)):
                for what, results in found.items():
                    if path == "cold":
                        _forget(folder)
                    results.append(in_a_process(read, what, folder))
            times = {what: [taken for taken, _ in results] for what, results in found.items()}
            held = {what: int(median(peak for _, peak in results)) for what, results in found.items()}
            measured, baseline = summary(times[LOAD]), summary(times[READ])["median_s"]
            run.rows.add(
                phase="load", mode=LOAD, path=path, prompts="-", batch=1, length=0, **measured, baseline_s=baseline,
                speedup=baseline / measured["median_s"], peak_bytes=held[LOAD], needed_bytes=held[READ],
                weight_bytes=subject.weight_bytes,
            )  # fmt: skip


def read(what: str, folder: Path) -> tuple[float, int]:
    """Return the seconds until every weight in `folder` has been read once, and the most bytes that this process held more."""
    taken: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        if what == READ:
            tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
        else:
            tensors = list(load_model(folder, device="cpu")[0].parameters())
        with torch.no_grad():
            for tensor in tensors:
                tensor.sum()  # a mapped file isn't read before
        taken.append(time.perf_counter() - start)

    peak = peak_above(work)
    return taken[0], peak or 0


def _forget(folder: Path) -> None:
    """Have the system drop its cached copy of the weight files."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
