"""What the benchmark compares: Dynamic-LLaVA's modes, FastV as the paper ran it, and any policy by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import Context
from dynllava_plugin.sparsity.config import SparsityConfig

if TYPE_CHECKING:  # the command line lists the modes: it must not wait for torch
    from dynllava_plugin.policies import Policy

FULL = "full"  # what the others are compared with
# mode -> as plots call it
MODES = {
    FULL: "full context",
    "image": "Dynamic-LLaVA I",
    "image_text": "Dynamic-LLaVA I|T",
    "fastv": "FastV (k=3, r=0.75)",
}


def policy_text(mode: str) -> str:
    """Return the `policy=` of a mode; FastV is the paper's."""
    return "fastv,k=3,r=0.75" if mode == "fastv" else mode


def policy_in(mode: str, vision_rate: float = 0.2) -> Policy:
    """Return a mode's policy; one without a budget in its name keeps the share `vision_rate` of the image tokens."""
    from dynllava_plugin.policies.registry import policy_changes, policy_of

    changes = policy_changes({"policy": policy_text(mode)})
    return policy_of(SparsityConfig(vision_keep_rate=vision_rate).replace(**changes))


def context_in(
    mode: str, layers: int, images: int, text: int, vision_rate: float, text_rate: float
) -> Context:
    """Return what a mode leaves of a prompt with `images` image tokens and `text` text tokens."""
    from dynllava_plugin.policies.contexts import context_of

    policy = policy_in(mode, vision_rate).of_depth(layers)
    return context_of(policy, layers, images, policy.kept_tokens(images), text, text_rate)


def modes_named(flag: str, text: str) -> list[str]:
    """Return the modes of a comma-separated list; "full" comes first and always.

    Besides `MODES` a list may name policies with their arguments: ``image_text,h2o,r=0.5,downsample``.

    Raises
    ------
    UserError
        An unknown name or argument, or a policy that chooses inside the vision tower, which the benchmark leaves out.
    """
    modes: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if ("=" in part or ":" in part) and modes:  # an argument, or a step of a schedule
            modes[-1] += f",{part}"
        elif part:
            modes.append(part)
    if not modes:
        from dynllava_plugin.policies.registry import POLICIES

        raise UserError(f"{flag}: empty; choose from {', '.join([*MODES, *POLICIES])}")
    for mode in modes:
        try:
            policy = policy_in(mode)
        except UserError as error:
            raise UserError(f"{flag} {mode}: {error}") from None
        if policy.reduces_patches:
            raise UserError(
                f"{flag} {mode}: chooses inside the vision tower, which this benchmark leaves out; "
                "`dynllava compare` times it"
            )
    return list(dict.fromkeys([FULL, *modes]))
