"""What is compared: policies, each at several shares of the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import Policy, policy_of
from dynllava_plugin.policies.base import OUTPUT
from dynllava_plugin.policies.registry import POLICIES, arguments_of, check_policy, describe, parse_policy
from dynllava_plugin.sparsity.config import SparsityConfig

# Without --policies: every registered way to have fewer image tokens, so all but those that drop output text alone.
DEFAULT_POLICIES = (
    *(name for name, policy in POLICIES.items() if policy.decides != {OUTPUT}),
    "fastv+h2o",
)
BUDGETS = ("keep", "r", "n", "ratio", "tokens")


@dataclass(frozen=True)
class Subject:
    """One row of the comparison: a policy with the share of tokens it keeps, None where that isn't varied."""

    name: str
    keep: float | None
    policy: str  # as `parse_policy` reads it

    def settings(self, sparsity: SparsityConfig) -> SparsityConfig:
        """The checkpoint's settings with this policy."""
        name, arguments = parse_policy(self.policy)
        return sparsity.replace(policy=name, policy_args=arguments)

    def of(self, sparsity: SparsityConfig) -> Policy:
        """The policy itself."""
        return policy_of(self.settings(sparsity))


def subjects(
    policies: Sequence[str], keeps: Sequence[float], sparsity: SparsityConfig, num_layers: int
) -> list[Subject]:
    """Every policy at every share; one whose text names a budget, or that has none, only as it is.

    A policy that finds its number of tokens by a rule of its own is there by that rule, too.

    Raises
    ------
    UserError
        An unknown policy or argument, a share that keeps nothing, a policy named twice.
    """
    for keep in keeps:
        if not 0 < keep <= 1:
            raise UserError(f"--keep: {keep} is outside (0, 1]")
    found: list[Subject] = []
    for text in policies:
        name, arguments = parse_policy(text)
        key = _budget(name, arguments)
        if key is None or _has_own_rule(name):
            found.append(Subject(text, None, text))
        if key is not None:
            found += [Subject(text, keep, describe(name, {**arguments, key: keep})) for keep in keeps]
    for subject in found:
        check_policy(subject.settings(sparsity), num_layers)
    names = [(subject.name, subject.keep) for subject in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--policies: {twice[0]} is named twice")
    return found


def _has_own_rule(name: str) -> bool:
    return name in POLICIES and POLICIES[name].own_budget


def _budget(name: str, arguments: dict[str, Any]) -> str | None:
    """The argument that a share is given to: `keep` of image tokens, or `r` of a cache alone."""
    known = arguments_of(name)
    if {key.rpartition(".")[2] for key in arguments} & set(BUDGETS):
        return None
    if "keep" in known:
        return "keep"
    return "r" if name in ("h2o", "snapkv") else None
