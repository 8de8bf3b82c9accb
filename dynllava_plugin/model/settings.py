"""The settings of a loaded model: changed, checked against it, in force for one call, and told by `print`."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import nn

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.base import SQUARE
from dynllava_plugin.policies.registry import check_policy, policy_changes
from dynllava_plugin.sparsity.config import SparsityConfig

# Settings that the loaded weights fix.
FIXED = (
    *("predictor_dim", "predictor_heads", "predictor_ffn_dim", "predictor_layers", "text_predictor"),
    *("later_gates", "vision_keep_range", "prompt_predictor"),
)


class SparseSettings(nn.Module):
    """Of `SparseVLM`: its settings."""

    config: Any
    model: Any
    gives: ClassVar[frozenset[str]] = frozenset()  # what policies may need of a family (`Part.needs`)
    check_family: Any

    def set_sparsity(self, **changes: Any) -> SparsityConfig:
        """Change the policy, the mode, a keep rate or l of the loaded model: `set_sparsity(policy="fastv", k=3, r=0.75)`.

        Raises `UserError` for an unknown setting or policy, a value out of range, a policy that this family can't
        run, or a predictor size, which the weights fix.
        """
        settings = self.checked(self.config.sparsity, changes)
        self.config.text_config.sparsity = settings
        return settings

    def checked(self, current: SparsityConfig, changes: dict[str, Any]) -> SparsityConfig:
        """Return `current` settings with `changes`, which fit this model, or raise `UserError`."""
        for name in FIXED:
            if name in changes and changes[name] != getattr(current, name):
                raise UserError(
                    f"{name}: the loaded predictors have {getattr(current, name)}; it can't be changed"
                )
        settings = current.replace(**policy_changes(changes))
        policy = check_policy(settings, self.config.text_config.num_hidden_layers)
        self.check_family(policy)
        self.check_images(policy, self.config)
        return settings

    def policy_in_force(self, policy: str | None = None) -> AbstractContextManager[None]:
        """Return a context in which this thread's calls of the model run under `policy`, the model's own where None.

        Other threads, and `set_sparsity` meanwhile, change nothing in it.

        Raises `UserError` for an unknown policy, or one that the model can't run.
        """
        settings = self.model.language_model.config.sparsity
        if policy is not None:
            settings = self.checked(settings, {"policy": policy})
        return self.model.language_model.settings_of_call(copy.deepcopy(settings))

    @classmethod
    def check_images(cls, policy: Policy, config: Any) -> None:
        """Raise `UserError` for a budget of image tokens that no image can have, where all have one number of tokens."""
        if SQUARE in cls.gives:
            policy.check_image(config.image_seq_length)
            if policy.reduces_patches:
                policy.image.first.earlier_layer(config.vision_config.num_hidden_layers)  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Return the policy in force, the layers of its gates and its keep rate, for `print(model)`."""
        policy = self.model.language_model.policy
        gates = ", ".join(map(str, policy.layers)) or "none"
        total = self.config.image_seq_length if SQUARE in self.gives else 576
        try:
            kept = f"{policy.kept_tokens(total) / total:.3g}"
        except UserError:  # a number of tokens that not every image has
            kept = "by the image"
        return f"policy={policy.name}, gates at layers: {gates}, keep rate of image tokens: {kept}"
