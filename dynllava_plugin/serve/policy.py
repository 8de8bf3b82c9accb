"""Which policies a served model can run."""

from __future__ import annotations

import sys
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.registry import check_policy


class Policies:
    """Checks a request's policy; says once that predictors are asked which nobody trained.

    Parameters
    ----------
    model : SparseVLM
        From `load_model`, which has said so of the model's own policy.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.said = not model.fresh_predictors or self._found(model.config.text_config.sparsity).predictors

    def check(self, policy: Any) -> None:
        """Raise `UserError` for a policy (None: the model's own) that is unknown or unfit for the model."""
        if policy is None:
            return
        if not isinstance(policy, str):
            raise UserError(f"policy: {policy!r} is not a text such as 'fastv,k=3'")
        settings = self.model.checked(self.model.config.text_config.sparsity, {"policy": policy})
        if self._found(settings).predictors and not self.said:
            self.said = True
            print(
                f"a request asks for {policy}: the checkpoint has no predictors, untrained ones stand in",
                file=sys.stderr,
            )

    def _found(self, settings: Any) -> Any:
        return check_policy(settings, self.model.config.text_config.num_hidden_layers)
