"""Muon for the hidden matrices, AdamW for everything else, one schedule for both."""

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Muon's Newton-Schulz iteration: float [n, rows, columns], rows <= columns -> near-orthogonal rows."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon in float32, all matrices of a shape at once; torch's own works in bfloat16, slow on CPUs.

    Parameters
    ----------
    params : list of 2-D parameters
    lr, momentum : float
        As `torch.optim.Muon` (Nesterov, no weight decay).
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[(min(p.shape), max(p.shape))].append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(buffer, group["momentum"])
                    updates.append(update if p.shape[0] == rows else update.mT)
                scale = group["lr"] * max(1.0, columns / rows) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    p.add_(update if p.shape[0] == rows else update.mT, alpha=-scale)


class Optimizers:
    """Both optimizers with linear warmup, then linear decay to zero.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters are split: 2-D weights of layers and projector go to Muon.
    steps : int
        Length of the schedule.
    lr, muon_lr : float
        Peak rates of AdamW and Muon.
    """

    def __init__(self, model: nn.Module, steps: int, lr: float, muon_lr: float, warmup: int = 50) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p.ndim == 2 and (".layers." in name or "projector" in name) for name, p in named]
        hidden = [p for (_, p), flag in zip(named, inner, strict=True) if flag]
        rest = [p for (_, p), flag in zip(named, inner, strict=True) if not flag]
        self.parameters = hidden + rest
        self.optimizers = [
            Muon(hidden, lr=muon_lr),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

        def factor(step: int) -> float:
            return min((step + 1) / warmup, max(0.0, (steps - step) / (0.6 * steps)), 1.0)

        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers]

    def step(self) -> None:
        """Clip the gradients to norm 1, update, advance the schedule, clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
