"""Peak memory of a piece of training.

On a GPU: the allocator's peak. On a CPU: the resident set's high-water mark (VmHWM), reset before the piece runs, less what was
resident then; each piece in a process of its own, so that no other has left freed pages behind. Before the mark is set the process
has run a small piece of the same kind, which loads libraries and starts threads. Only Linux can reset the mark; elsewhere memory is
not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dynllava_plugin.bench.masked_cases import AttentionShape, attention_inputs
from dynllava_plugin.bench.train_attention import IMPLEMENTATIONS
from dynllava_plugin.bench.train_step import Step, StepSettings
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import DecoderShape

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def attention_peak(shape: AttentionShape, kept: str, implementation: str, device: torch.device) -> int | None:
    """Bytes above the inputs: output, gradients and everything between."""
    if device.type == "cuda":
        inputs = attention_inputs(shape, kept, device)
        return _allocated(lambda: IMPLEMENTATIONS[implementation](inputs), device, above=True)
    return _in_a_process(
        "attention",
        shape={**asdict(shape), "dtype": str(shape.dtype)[6:]},
        kept=kept,
        implementation=implementation,
    )


def step_peak(settings: StepSettings, implementation: str, step: Step | None) -> int | None:
    """Bytes of everything a step holds: weights, gradients, optimiser states, activations. `step` is the GPU's, built already."""
    if step is not None:
        step(implementation)
        return _allocated(lambda: step(implementation), torch.device(settings.device), above=False)
    plain = {**asdict(settings), "shape": asdict(settings.shape), "dtype": str(settings.dtype)[6:]}
    return _in_a_process("step", settings=plain, implementation=implementation)


def _allocated(call: Callable[[], Any], device: torch.device, above: bool) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device) if above else 0
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _in_a_process(what: str, **case: Any) -> int | None:
    if not _CLEAR.exists():
        return None
    case |= {"what": what, "threads": torch.get_num_threads()}
    run = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(case), capture_output=True, text=True, check=False
    )
    if run.returncode == -9:
        raise UserError(f"bench train: no memory for {case}; take a smaller --batch or --lengths")
    if run.returncode:
        raise RuntimeError(f"the process that measures memory failed on {case}:\n{run.stderr}")
    return int(run.stdout.split()[-1])


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure(call: Callable[[], Any]) -> int:
    before = _resident("VmRSS")
    _CLEAR.write_text("5")
    call()
    return _resident("VmHWM") - before


def _main() -> None:
    case = json.load(sys.stdin)
    torch.set_num_threads(case["threads"])
    if case["what"] == "attention":
        shape = AttentionShape(**{**case["shape"], "dtype": getattr(torch, case["shape"]["dtype"])})
        attend = IMPLEMENTATIONS[case["implementation"]]
        attend(attention_inputs(replace(shape, length=min(shape.length, 64)), case["kept"], "cpu"))
        inputs = attention_inputs(shape, case["kept"], "cpu")
        print(_measure(lambda: attend(inputs)))
    else:
        fields = case["settings"]
        fields |= {"shape": DecoderShape(**fields["shape"]), "dtype": getattr(torch, fields["dtype"])}
        settings = StepSettings(**fields)
        small = replace(settings, batch=1, shape=replace(settings.shape, layers=3, vocab=64))
        Step(small)(case["implementation"])

        def two_steps() -> None:
            step = Step(settings)
            step(case["implementation"])  # makes the optimiser's states
            step(case["implementation"])

        print(_measure(two_steps))


if __name__ == "__main__":
    _main()
