"""What the benchmark compares: Dynamic-LLaVA's modes, FastV as the paper ran it, and any policy by its name."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    name : str
        As on the command line.
    title : str
        As in tables and plots.
    sparsity : dict
        Arguments of `set_sparsity`.
    """

    name: str
    title: str
    sparsity: dict[str, Any] = field(default_factory=dict)

    def policy(self, vision_rate: float = 0.2) -> Policy:
        """The policy behind it; one without a budget in its name keeps the share `vision_rate` of the image tokens."""
        from dynllava_plugin.policies.registry import policy_changes, policy_of

        base = SparsityConfig(vision_keep_rate=vision_rate)
        return policy_of(base.replace(**policy_changes(self.sparsity)))

    def context(self, layers: int, images: int, text: int, vision_rate: float, text_rate: float) -> Context:
        """What this mode leaves of a prompt with `images` image tokens and `text` text tokens."""
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


def modes_named(names: str) -> list[Mode]:
    """Modes from a comma-separated list; "full", which the others are compared with, comes first and always.

    Besides `MODES` a list may name policies with their arguments: ``image_text,h2o,r=0.5,downsample``.

    Raises
    ------
    UserError
        An unknown name or argument, or a policy that chooses inside the vision tower, which the benchmark leaves out.
    """
    texts = _texts(names)
    if not texts:
        from dynllava_plugin.policies.registry import POLICIES

        raise UserError(f"--mode: empty; choose from {', '.join([*MODES, *POLICIES])}")
    return [_mode(text) for text in dict.fromkeys(["full", *texts])]


def _texts(names: str) -> list[str]:
    """``"a,b,k=3,c"`` -> ["a", "b,k=3", "c"]."""
    texts: list[str] = []
    for part in (part.strip() for part in names.split(",")):
        if ("=" in part or ":" in part) and texts:  # an argument, or a step of a schedule
            texts[-1] += f",{part}"
        elif part:
            texts.append(part)
    return texts


def _mode(text: str) -> Mode:
    if text in MODES:
        return MODES[text]
    mode = Mode(text, text, {"policy": text})
    try:
        policy = mode.policy()
    except UserError as error:
        raise UserError(f"--mode {text}: {error}") from None
    if policy.reduces_patches:
        raise UserError(
            f"--mode {text}: chooses inside the vision tower, which this benchmark leaves out; `dynllava compare` times it"
        )
    return mode
