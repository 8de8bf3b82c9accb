"""What is compared: policies, each at several budgets of image tokens."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.base import CACHE, OUTPUT, Part
from dynllava_plugin.policies.registry import (
    POLICIES,
    arguments_of,
    check_policy,
    describe,
    parse_policy,
    policy_of,
)
from dynllava_plugin.sparsity.config import SparsityConfig

ALL, FULL = "all", "full"
# Every registered way to have fewer image tokens, so all but those that drop output text alone, and a schedule of one's own.
DEFAULT_POLICIES = (
    *(name for name, policy in POLICIES.items() if policy.decides != {OUTPUT} and name != "schedule"),
    "fastv+h2o",
)
KEEP, TOKENS = "keep", "tokens"
BUDGETS = (KEEP, "r", "n", "ratio", "shares", "steps", "threshold", TOKENS)


@dataclass(frozen=True)
class Subject:
    """One row of the comparison: a policy with its budget, a share or tokens, both None where that isn't varied."""

    name: str
    keep: float | None
    policy: str  # as `parse_policy` reads it
    tokens: float | None = None

    @property
    def title(self) -> str:
        """Return its name and budget."""
        if self.tokens is not None:
            return f"{self.name} at {self.tokens:g} tokens"
        return self.name if self.keep is None else f"{self.name} at {self.keep:.0%}"

    @property
    def learned(self) -> bool:
        """Return whether it asks trained predictors."""
        return bool(policy_of(self.settings(SparsityConfig())).predictors)

    @property
    def code(self) -> str:
        """Return a digest of the files that its rule is written in: a figure belongs to the rule as it was."""
        parts = policy_of(self.settings(SparsityConfig())).parts
        methods = [method for part in parts for method in (part, *getattr(part, "steps", ()))]
        classes = {one for method in methods for one in type(method).__mro__ if issubclass(one, Part)}
        files = sorted({inspect.getfile(one) for one in classes if one.__module__ != Part.__module__})
        digest = hashlib.sha256()
        for file in files:
            digest.update(Path(file).read_bytes())
        return digest.hexdigest()[:16]

    def settings(self, sparsity: SparsityConfig) -> SparsityConfig:
        """Return the checkpoint's settings with this policy."""
        name, arguments = parse_policy(self.policy)
        return sparsity.replace(policy=name, policy_args=arguments)

    def check(self, model: Any) -> Policy:
        """Return the policy in `model`, or raise `UserError` with why this model can't run it or reach the budget."""
        layers = model.config.text_config.num_hidden_layers
        policy = check_policy(self.settings(model.config.sparsity), layers)
        model.check_family(policy)
        model.check_images(policy, model.config)
        if policy.predictors and getattr(model, "fresh_predictors", False):
            raise UserError(
                f"{policy.name}: needs predictors, and this checkpoint has none that were trained"
            )
        return policy

    @contextmanager
    def in_force(self, model: Any) -> Iterator[None]:
        """Let `model` have this policy instead of its checkpoint's."""
        base = model.config.sparsity
        model.config.text_config.sparsity = self.settings(base)
        try:
            yield
        finally:
            model.config.text_config.sparsity = base

    def reason(self, error: UserError) -> str:
        """Return what `error` says without the policy's name, which several may share."""
        name = self.policy.partition(",")[0]
        return str(error).removeprefix(f"{name}: ").removeprefix(f"policy: {name} ")


def subjects(policies: Sequence[str], kind: str, budgets: Sequence[float]) -> list[Subject]:
    """Return every policy at every budget; one whose text names a budget, or that has none, only as it is.

    A policy that finds its number of tokens by a rule of its own is there by that rule, too.

    Parameters
    ----------
    kind : str
        `KEEP`: shares of the image tokens; `TOKENS`: means over layers, as papers count. A policy without a budget of image
        tokens (a cache's) isn't varied by the latter.

    Raises
    ------
    UserError
        An unknown policy, a budget of nothing, a policy named twice.
    """
    for budget in budgets:
        if not (0 < budget <= 1 if kind == KEEP else budget >= 1):
            raise UserError(
                f"--{kind}: {budget:g} is {'outside (0, 1]' if kind == KEEP else 'less than one token'}"
            )
    found: list[Subject] = []
    for text in policies:
        name, arguments = parse_policy(text)
        key = _budget(name, arguments, kind)
        if key is None or (name in POLICIES and POLICIES[name].own_budget):
            found.append(Subject(text, None, text))
        for budget in budgets if key else ():
            assert key is not None
            whole = int(budget) if kind == TOKENS and budget == int(budget) else budget
            varied = describe(name, {**arguments, key: whole})
            found.append(Subject(text, **{KEEP: None, kind: budget}, policy=varied))  # type: ignore[arg-type]
    names = [subject.title for subject in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--policies: {twice.partition(' at ')[0]} is named twice")
    return found


def runnable(
    found: Sequence[Subject], model: Any, listed: bool, samples: Sequence[dict[str, Any]] = ()
) -> tuple[list[Subject], dict[str, list[str]]]:
    """Return the subjects that `model` can run, and the others' titles by the reason why not.

    `samples` are `model(...)` arguments to try each one on: where images differ in size, a budget may be out of reach for some.

    Raises
    ------
    UserError
        Unless `listed` (nobody named them one by one): the first one's reason. And where nothing is left to compare.
    """
    able: list[Subject] = []
    reasons: dict[str, list[str]] = {}
    for subject in found:
        try:
            subject.check(model)
            for sample in samples:
                with subject.in_force(model), torch.inference_mode():
                    model(**sample, logits_to_keep=1)
            able.append(subject)
        except UserError as error:
            if not listed:
                raise
            reasons.setdefault(subject.reason(error), []).append(subject.title)
    if reasons and all(subject.name == FULL for subject in able):
        reason, titles = next(iter(reasons.items()))
        raise UserError(f"--policies: none can run here; {titles[0]}: {reason}")
    return able, reasons


def _budget(name: str, arguments: dict[str, Any], kind: str) -> str | None:
    """Return the argument that a budget is given to: the image tokens', or with shares `r` of a cache alone."""
    known = arguments_of(name)
    if {key.rpartition(".")[2] for key in arguments} & set(BUDGETS):
        return None
    if kind in known:
        return kind
    return "r" if kind == KEEP and name in POLICIES and POLICIES[name].decides == {CACHE} else None
