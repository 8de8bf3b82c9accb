"""The Triton attention: in Triton's interpreter, compiled for a GPU that isn't here, and run where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for Linux only")

from dynllava_plugin.bench.attention import AttentionCase, AttentionInputs, attention_inputs  # noqa: E402
from dynllava_plugin.sparsity.kernels import triton_kernels as kernels  # noqa: E402
from dynllava_plugin.sparsity.kernels.triton_launch import Tile, constants  # noqa: E402
from dynllava_plugin.sparsity.masked_softmax import (  # noqa: E402
    context_matrix,
    masked_softmax_attention,
    plain_masked_softmax,
    training_context,
    visible_matrix,
)

ROOT = Path(__file__).parents[1]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}
CASES = [
    dict(seed=0, batch=2, heads=[2, 1], length=37, dim=16, rate=0.5, padding="left", dtype="float32"),
    dict(seed=1, batch=2, heads=[1, 1], length=41, dim=24, rate=0.0, padding="whole sample", dtype="float32"),
    dict(
        seed=3,
        batch=1,
        heads=[1, 1],
        length=70,
        dim=16,
        rate=0.3,
        padding="anywhere",
        dtype="float32",
        spread=8,
    ),
    dict(seed=4, batch=1, heads=[1, 1], length=40, dim=16, rate=1.0, padding="right", dtype="float16"),
    dict(seed=5, batch=1, heads=[1, 1], length=1, dim=16, rate=0.0, padding="none", dtype="float32"),
]


def test_equals_the_full_matrix_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_interpreter"],
        input=json.dumps(CASES), capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(CASES)
    for case, errors in zip(CASES, found, strict=True):
        for name, error in errors.items():
            assert error <= TOLERANCE[case["dtype"]], f"{name} is off by {error:.1e} in {case}"


@pytest.mark.parametrize(
    ("kernel", "more"),
    [
        (kernels._forward_kernel, {}),
        (kernels._query_kernel, {}),
        (kernels._kept_kernel, {}),
        (kernels._dropped_kernel, {"NEED_KEEP": True}),
    ],
)
def test_compiles_to_tensor_core_code_without_a_gpu(kernel, more):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {**constants(32, torch.bfloat16, Tile(32, 32)), **more}
    options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    tensors = {"q", "k", "v", "out", "upstream", "grad_q", "grad_k", "grad_v"}
    types = {name: "*bf16" for name in tensors} | {"packing": "*i32"}
    types |= {name: "*fp32" for name in ("lse", "cap", "delta", "grad_keep")}
    types |= {name: "fp32" for name in ("scale", "scaling", "max_exponent")}
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, values), target=GPUTarget("cuda", 80, 32), options=options
    )
    assert "mma.sync" in compiled.asm["ptx"] and compiled.asm["cubin"]


def errors(inputs: AttentionInputs, plain: bool) -> list[float]:
    """Relative errors of the output and of the gradients of query, key, value and keep mask, against the full matrix in float64."""
    found, scaling = [], inputs.query.shape[-1] ** -0.5
    for full, dtype in ((plain, inputs.query.dtype), (True, torch.float64)):
        query, key, value, keep = (leaf.detach().to(dtype).requires_grad_() for leaf in inputs[:4])
        if full:
            masks = context_matrix(keep), visible_matrix(inputs.valid)
            out = plain_masked_softmax(query, key, value, *masks, scaling)
        else:
            keep = inputs.keep.detach().requires_grad_()
            context = training_context(keep, inputs.valid)
            out = masked_softmax_attention(query, key, value, context, scaling)
        gradients = torch.autograd.grad(out, (query, key, value, keep), inputs.upstream.to(out.dtype))
        found.append([tensor.detach().double() for tensor in (out, *gradients)])
    return [float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(*found, strict=True)]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; without one the interpreter runs the kernels"
)
@pytest.mark.parametrize(
    ("case", "padding"),
    [
        (AttentionCase(640, 2, 4, 4, 128, torch.bfloat16), (0, 0)),
        (AttentionCase(333, 3, 4, 2, 128, torch.float32), (17, 0)),
        (AttentionCase(257, 2, 4, 1, 64, torch.float16), (0, 40)),
        (
            AttentionCase(130, 2, 2, 2, 32, torch.bfloat16, kept="all"),
            (0, 130),
        ),  # the second sample is padding
        (AttentionCase(200, 1, 2, 2, 80, torch.float16), (0, 0)),
        (AttentionCase(200, 1, 2, 2, 256, torch.bfloat16), (0, 0)),
        (AttentionCase(2048, 1, 4, 4, 128, torch.bfloat16), (0, 0)),
    ],
)
def test_equals_the_full_matrix_on_this_gpu(case, padding):
    """Both are rounded; ours must not be much worse. `padding`: of each sample but the first, left and right."""
    inputs = attention_inputs(replace(case, device="cuda"))
    inputs.valid[1:, : padding[0]] = False
    inputs.valid[1:, case.length - padding[1] :] = False
    ours, full = errors(inputs, plain=False), errors(inputs, plain=True)
    floor = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[case.dtype]
    assert all(a <= max(3 * b, floor) for a, b in zip(ours, full, strict=True)), (ours, full)
