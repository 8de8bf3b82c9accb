"""What the benchmark compares: Dynamic-LLaVA's modes, FastV as the paper ran it, and any policy by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import Context
from dynllava_plugin.sparsity.config import SparsityConfig

if TYPE_CHECKING:  # the command line lists the modes: it must not wait for torch
    from dynllava_plugin.policies import Policy


@dataclass(frozen=True)
class Mode:
    """A way to treat the context.

    Parameters
    ----------
    name, title : str
        As on the command line; as in plots.
    sparsity : dict
        Arguments of `set_sparsity`.
    """

    name: str
    title: str
    sparsity: dict[str, Any]

    def policy(self, vision_rate: float = 0.2) -> Policy:
        """Return the policy behind it; one without a budget in its name keeps the share `vision_rate` of the image tokens."""
        from dynllava_plugin.policies.registry import policy_changes, policy_of

        base = SparsityConfig(vision_keep_rate=vision_rate)
        return policy_of(base.replace(**policy_changes(self.sparsity)))

    def context(self, layers: int, images: int, text: int, vision_rate: float, text_rate: float) -> Context:
        """Return what this mode leaves of a prompt with `images` image tokens and `text` text tokens."""
        from dynllava_plugin.policies.contexts import context_of

        policy = self.policy(vision_rate).of_depth(layers)
        return context_of(policy, layers, images, policy.kept_tokens(images), text, text_rate)


MODES = {
    mode.name: mode
    for mode in (
        Mode("full", "full context", {"mode": "full"}),
        Mode("image", "Dynamic-LLaVA I", {"mode": "image"}),
        Mode("image_text", "Dynamic-LLaVA I|T", {"mode": "image_text"}),
        Mode("fastv", "FastV (k=3, r=0.75)", {"policy": "fastv,k=3,r=0.75"}),
    )
}


def modes_named(flag: str, text: str) -> list[Mode]:
    """Return the modes of a comma-separated list; "full", which the others are compared with, comes first and always.

    Besides `MODES` a list may name policies with their arguments: ``image_text,h2o,r=0.5,downsample``.

    Raises
    ------
    UserError
        An unknown name or argument, or a policy that chooses inside the vision tower, which the benchmark leaves out.
    """
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if ("=" in part or ":" in part) and names:  # an argument, or a step of a schedule
            names[-1] += f",{part}"
        elif part:
            names.append(part)
    if not names:
        from dynllava_plugin.policies.registry import POLICIES

        raise UserError(f"{flag}: empty; choose from {', '.join([*MODES, *POLICIES])}")
    return [_mode(flag, name) for name in dict.fromkeys(["full", *names])]


def _mode(flag: str, name: str) -> Mode:
    if name in MODES:
        return MODES[name]
    mode = Mode(name, name, {"policy": name})
    try:
        policy = mode.policy()
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from None
    if policy.reduces_patches:
        raise UserError(
            f"{flag} {name}: chooses inside the vision tower, which this benchmark leaves out; `dynllava compare` times it"
        )
    return mode
