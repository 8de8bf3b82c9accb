"""Checks the Triton training attention on this machine's CUDA device: `python -m dynllava_plugin.bench.masked_check`.

Each row compares it with the full-matrix implementation in float64 on the same rounded inputs, and that implementation in the
inputs' own dtype likewise: relative errors of the output and of the gradients of query, key, value and keep mask. Ours must not be
much worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from dynllava_plugin.bench.masked_cases import AttentionInputs, AttentionShape, attention_inputs
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


def main() -> int:
    """Exit status 1 where a case is wrong."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device; without one the tests run these kernels in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    return 0 if check() else 1


if __name__ == "__main__":
    sys.exit(main())
