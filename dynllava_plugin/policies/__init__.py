"""Ways to choose which tokens stay: Dynamic-LLaVA's predictors and the methods it is compared with."""

from dynllava_plugin.policies.points import Choice, Gate, TokenLayout
from dynllava_plugin.policies.policy import Policy
from dynllava_plugin.policies.registry import POLICIES, parse_policy, policy_of

__all__ = ["POLICIES", "Choice", "Gate", "Policy", "TokenLayout", "parse_policy", "policy_of"]
