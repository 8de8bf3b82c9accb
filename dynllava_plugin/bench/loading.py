"""Loading a checkpoint against reading its bytes with safetensors alone, each in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from dynllava_plugin import load_model
from dynllava_plugin.bench.run import Run
from dynllava_plugin.bench.timing import require_disk, summary
from dynllava_plugin.errors import UserError

READ, LOAD = "safetensors", "load_model"


def load(run: Run) -> None:
    """`load_model` of the shape's checkpoint: seconds and memory until every weight has been read once."""
    if run.rows.has([{"phase": "load"}]):
        return
    require_disk(run.subject.weight_bytes, Path(tempfile.gettempdir()))
    processor = (
        run.subject.loaded.processor
        if run.subject.loaded
        else load_model("tiny", device="cpu", mode="full")[1]
    )
    with tempfile.TemporaryDirectory(prefix="dynllava-bench-") as name:
        folder = Path(name)
        run.subject.model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path, cold in (("cold", True), ("warm", False)):
            found: dict[str, list[dict[str, float]]] = {READ: [], LOAD: []}
            for _ in range(max(run.repeats // 2, 2)):
                for what, results in found.items():
                    results.append(_in_a_process(what, folder, cold))
            times = {what: [result["seconds"] for result in results] for what, results in found.items()}
            held = {what: median(result["bytes"] for result in results) for what, results in found.items()}
            measured = summary(times[LOAD])
            read = summary(times[READ])["median_s"]
            run.add(
                phase="load", mode=LOAD, path=path, prompts="-", batch=1, length=0, **measured, baseline_s=read,
                speedup=read / measured["median_s"], peak_bytes=int(held[LOAD]), needed_bytes=int(held[READ]),
                weight_bytes=run.subject.weight_bytes,
            )  # fmt: skip


def _in_a_process(what: str, folder: Path, cold: bool) -> dict[str, float]:
    if cold:
        _forget(folder)
    command = [sys.executable, "-m", "dynllava_plugin.bench.loading", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"load: reading {folder} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _forget(folder: Path) -> None:
    """Have the system drop its cached copy of the weight files."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at the most so far."""
    name = "VmHWM" if peak else "VmRSS"
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def _child(what: str, folder: Path) -> None:
    from safetensors.torch import load_file

    before = _resident(peak=False)
    start = time.perf_counter()
    if what == READ:
        tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    else:
        tensors = list(load_model(folder, device="cpu")[0].parameters())
    with torch.no_grad():
        for tensor in tensors:
            tensor.sum()  # a mapped file isn't read before
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": _resident(peak=True) - before}))


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
