"""What a policy leaves of a prompt and its answer, as FLOPs and bytes are counted."""

from __future__ import annotations

from dynllava_plugin.flops import Context
from dynllava_plugin.policies.base import IMAGE, OUTPUT, Policy


def context_of(
    policy: Policy, layers: int, images: float, kept: float, text: float, predicted_text_keep: float = 1.0
) -> Context:
    """The context behind `policy` in a model of `layers` layers.

    Parameters
    ----------
    images, kept, text : float
        Image tokens of the prompt, those that stay, and its text tokens; may be means over samples.
    predicted_text_keep : float
        Share of the output tokens that the text predictor keeps, for a policy that asks it.

    Notes
    -----
    What chooses the tokens besides the predictors (one row of attention, a similarity matrix) is not counted; it is in a
    measured time.
    """
    share = policy.output_share
    return Context(
        split=_split(policy, layers),
        images=kept if policy.at_input else images,  # type: ignore[arg-type]
        kept_images=kept if IMAGE in policy.decides else images,  # type: ignore[arg-type]
        text=text,  # type: ignore[arg-type]
        text_keep=predicted_text_keep if share is None else share,
        image_predictor=IMAGE in policy.predictors,
        text_predictor=OUTPUT in policy.predictors,
        held_share=policy.cache_share,
    )


def _split(policy: Policy, layers: int) -> int:
    acts_at_gate = policy.decides - ({IMAGE} if policy.at_input else frozenset())
    return policy.gate_layer if acts_at_gate else layers
