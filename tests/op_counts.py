"""What a call asks of the host: tensor operations by dispatch, views left out, and waits for a value of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that give the host a value, or a shape, that a device would have to be waited for.
READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
}


class Counting(TorchDispatchMode):
    """`ops` and `reads` of the calls made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.reads, self.names = 0, 0, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if name in READS or (name == "aten::index" and _indexes_by_mask(args)):
            self.reads += 1
        elif not is_view and name not in ("aten::detach", "aten::_unsafe_view"):
            self.ops += 1
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(args: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])


@contextmanager
def counted() -> Iterator[Counting]:
    """Count inside; `tolist`, which no dispatcher sees, is a read too."""
    mode, tolist = Counting(), torch.Tensor.tolist

    def counting(tensor: torch.Tensor) -> Any:
        mode.reads += 1
        with torch._C._DisableTorchDispatch():
            return tolist(tensor)

    torch.Tensor.tolist = counting  # type: ignore[method-assign]
    try:
        with torch.no_grad(), mode:
            yield mode
    finally:
        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
