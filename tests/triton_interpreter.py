"""Runs the Triton attention in Triton's interpreter and prints, one JSON object a line, its errors against the full matrix.

A process of its own, since TRITON_INTERPRET must be set before Triton is imported. (The interpreter has no bfloat16 products.)
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dynllava_plugin.sparsity import masked_softmax
from dynllava_plugin.sparsity.kernels import triton_launch
from dynllava_plugin.sparsity.kernels.triton_launch import Tile, Tiles
from tests.test_masked_softmax import inputs, ours, plain, with_gradients

# Small, and different, so that rows and columns can't be mixed up unseen.
TILES = Tiles(Tile(32, 16), Tile(16, 32), Tile(32, 16), Tile(16, 32))
NAMES = ("out", "query", "key", "value", "keep")


def main() -> None:
    """Cases come as JSON on stdin: lists of the arguments of `inputs`."""
    masked_softmax.implementation = lambda query: triton_launch
    triton_launch.tiles_for = lambda *_: TILES
    for case in json.load(sys.stdin):
        dtype = getattr(torch, case["dtype"])
        leaves, valid, upstream = inputs(**{**case, "dtype": dtype})
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = with_gradients(plain, exact, valid, upstream.double())
        found = with_gradients(ours, leaves, valid, upstream)
        errors = {
            name: float((a.double() - b).norm() / b.norm().clamp(min=1e-6))
            for name, a, b in zip(NAMES, found, expected, strict=True)
        }
        print(json.dumps(errors), flush=True)


if __name__ == "__main__":
    main()
