"""Checks the Triton training attention on this machine's CUDA device: `python -m dynllava_plugin.bench.masked_check [--tune]`.

Each row compares it with the full-matrix implementation in float64 on the same rounded inputs, and that implementation in the
inputs' own dtype likewise: relative errors of the output and of the gradients of query, key, value and keep mask. Ours must not be
much worse. `--tune` times tiles of each kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dynllava_plugin.bench.masked_cases import AttentionInputs, AttentionShape, attention_inputs
from dynllava_plugin.sparsity import masked_softmax
from dynllava_plugin.sparsity.masked_softmax import (
    context_matrix,
    masked_softmax_attention,
    plain_masked_softmax,
    training_context,
    visible_matrix,
)

NAMES = ("out", "query", "key", "value", "keep")
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WORSE = 3.0  # times the error of the full-matrix implementation in the same dtype


def cases() -> Iterator[tuple[AttentionShape, str, tuple[int, int]]]:
    """Shapes, masks and paddings."""
    yield AttentionShape(640, 2, 4, 4, 128, torch.bfloat16), "paper", (0, 0)
    yield AttentionShape(333, 3, 4, 2, 128, torch.float32), "paper", (17, 0)
    yield AttentionShape(257, 2, 4, 1, 64, torch.float16), "paper", (0, 40)
    yield (
        AttentionShape(130, 2, 2, 2, 32, torch.bfloat16),
        "all",
        (0, 130),
    )  # the second sample is padding only
    yield AttentionShape(200, 1, 2, 2, 80, torch.float16), "paper", (0, 0)
    yield AttentionShape(200, 1, 2, 2, 256, torch.bfloat16), "paper", (0, 0)
    yield AttentionShape(2048, 1, 4, 4, 128, torch.bfloat16), "paper", (0, 0)


def results(inputs: AttentionInputs, plain: bool, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Output and gradients, in float64."""
    scaling = inputs.query.shape[-1] ** -0.5
    query, key, value, keep = (x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs.leaves)
    if plain:
        out = plain_masked_softmax(
            query, key, value, context_matrix(keep), visible_matrix(inputs.valid), scaling
        )
    else:
        out = masked_softmax_attention(query, key, value, training_context(keep, inputs.valid), scaling)
    gradients = torch.autograd.grad(out, (query, key, value, keep), inputs.upstream.to(out.dtype))
    return [x.detach().double() for x in (out, *gradients)]


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Relative errors in the Frobenius norm."""
    return [float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, expected, strict=True)]


def check(device: str = "cuda") -> bool:
    """Print a line for each case; whether all are right."""
    right = True
    for shape, kept, padding in cases():
        inputs = attention_inputs(shape, kept, device, padding=padding)
        exact = results(inputs, plain=True, dtype=torch.float64)
        ours, theirs = errors(results(inputs, plain=False), exact), errors(results(inputs, plain=True), exact)
        fine = all(a <= max(WORSE * b, FLOOR[shape.dtype]) for a, b in zip(ours, theirs, strict=True))
        right &= fine
        pairs = " ".join(f"{name} {a:.0e}/{b:.0e}" for name, a, b in zip(NAMES, ours, theirs, strict=True))
        label = f"{str(shape.dtype)[6:]} {shape.batch}x{shape.heads}/{shape.kv_heads}x{shape.length}x{shape.head_dim}"
        print(f"{'ok   ' if fine else 'WRONG'} {label} {kept} padding {padding}: {pairs}", flush=True)
    return right


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call on the CUDA device, in ms."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def tune(shape: AttentionShape, kept: str) -> None:
    """Time tiles of each kernel, the others fixed."""
    from dynllava_plugin.sparsity import masked_softmax_triton as code

    inputs = attention_inputs(shape, kept, "cuda")
    query, key, value = (x.detach() for x in inputs.leaves[:3])
    packing = training_context(inputs.keep, inputs.valid).packing
    scaling = shape.head_dim**-0.5
    chosen = code.tiles_for(shape.head_dim, shape.dtype, query.device)
    saved = code.forward(query, key, value, packing, scaling, masked_softmax.MAX_EXPONENT)

    def time_of(tiles: Any, name: str) -> float:
        if name == "forward":
            return milliseconds(
                lambda: code.forward(query, key, value, packing, scaling, masked_softmax.MAX_EXPONENT, tiles)
            )
        return milliseconds(
            lambda: code.backward(inputs.upstream, query, key, value, packing, *saved, scaling, True, tiles)
        )

    by_row = [
        (64, 64, 4, 3), (64, 64, 4, 5), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 5), (64, 32, 4, 5),
        (128, 128, 8, 3), (128, 128, 8, 2),
    ]  # fmt: skip
    by_column = [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 8, 3),
        (64, 128, 8, 2),
        (32, 64, 4, 3),
        (32, 128, 8, 3),
    ]
    print(f"keep {kept}: backward with the tiles in use {time_of(chosen, 'query'):.3f} ms")
    for name, candidates in (
        ("forward", by_row),
        ("query", by_row),
        ("kept", by_column),
        ("dropped", by_column),
    ):
        for candidate in candidates:
            tile = code.Tile(*candidate)
            mark = " *" if tile == getattr(chosen, name) else ""
            try:
                print(
                    f"  {name} {tile}: {time_of(replace(chosen, **{name: tile}), name):.3f} ms{mark}",
                    flush=True,
                )
            except Exception as error:
                print(f"  {name} {tile}: {type(error).__name__}", flush=True)


def main() -> int:
    """Exit status 1 where a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="time tiles of each kernel instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device; without one the tests run these kernels in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    if args.tune:
        for kept in ("all", "paper"):
            tune(AttentionShape(2048, 8, 32, 32, 128, torch.bfloat16), kept)
        return 0
    return 0 if check() else 1


if __name__ == "__main__":
    sys.exit(main())
