"""Every policy by its name, and from a name and arguments to a policy."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Policy
from dynllava_plugin.policies.cdpruner import CDPruner
from dynllava_plugin.policies.combined import Combined
from dynllava_plugin.policies.divprune import DivPrune
from dynllava_plugin.policies.downsample import Downsample
from dynllava_plugin.policies.fastv import FastV
from dynllava_plugin.policies.full import Full
from dynllava_plugin.policies.h2o import H2O
from dynllava_plugin.policies.learned import LearnedImage, LearnedImageText, LearnedText
from dynllava_plugin.policies.prumerge import PruMergePlus
from dynllava_plugin.policies.random import RandomImage, RandomText
from dynllava_plugin.policies.structure import Structure
from dynllava_plugin.policies.visionzip import VisionZip
from dynllava_plugin.sparsity.config import SparsityConfig

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        LearnedImage,
        LearnedImageText,
        LearnedText,
        FastV,
        H2O,
        RandomImage,
        RandomText,
        Structure,
        Downsample,
        VisionZip,
        DivPrune,
        CDPruner,
        PruMergePlus,
    )
}
LEARNED = "learned"  # image_text, or image where the checkpoint or its mode has no more
# Arguments that default to the model's setting of another name.
SHARED = {
    "keep": "vision_keep_rate",
    "layer": "sparse_layer",
    "start_layer": "sparse_layer",
    "seed": "random_seed",
}
_EXCLUSIVE = ("keep", "r", "n")  # ways to give one budget


def policy_of(sparsity: SparsityConfig) -> Policy:
    """The policy that the settings name; without `policy`, the one that `mode` and `image_policy` stand for.

    Raises
    ------
    UserError
        An unknown policy or argument (the known ones are listed), or a combination that decides something twice.
    """
    name, arguments = sparsity.policy, sparsity.policy_args
    if name is None:
        name = sparsity.mode
        if name != "full" and sparsity.image_policy == "random":
            name = "random" if name == "image" else "random+text"
    parts = _parts(name)
    if len(parts) == 1:
        return _one(name, arguments, sparsity)
    given = _distribute(name, parts, arguments)
    made = [_one(part, given[part], sparsity) for part in parts]
    # A part with no layer of its own (chance, the cache) acts where the others do.
    follower = {
        part: policy.follows and policy.layer_argument not in given[part]
        for part, policy in zip(parts, made, strict=True)
    }
    leaders = {
        m.gate_layer for part, m in zip(parts, made, strict=True) if not follower[part] and not m.at_input
    }
    if len(leaders) == 1:
        for index, part in enumerate(parts):
            if follower[part] and not made[index].at_input:
                made[index] = replace(made[index], **{made[index].layer_argument: min(leaders)})
    return Combined(parts=tuple(made))


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """``"fastv,k=3,r=0.75"`` -> ("fastv", {"k": 3, "r": 0.75}), as policies are written on every command line."""
    name, *pairs = [part.strip() for part in text.split(",")]
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UserError(f"policy: {pair!r} in {text!r} is not argument=value")
        arguments[key] = _number(value)
    return name, arguments


def policy_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """What a user gives, `policy="fastv,k=3"` or `policy="fastv", k=3`, as changes of a `SparsityConfig`."""
    if changes.get("policy") is None:
        return changes
    settings = {field.name for field in fields(SparsityConfig)}
    name, arguments = parse_policy(str(changes["policy"]))
    arguments |= changes.get("policy_args") or {}
    arguments |= {key: value for key, value in changes.items() if key not in settings}
    return {
        **{key: value for key, value in changes.items() if key in settings},
        "policy": name,
        "policy_args": arguments,
    }


def check_policy(sparsity: SparsityConfig, num_layers: int | None = None) -> Policy:
    """The policy of the settings, which fit it and a model of `num_layers` layers, or a `UserError`."""
    sparsity.validate(num_layers)
    policy = policy_of(sparsity)
    policy.check(num_layers, sparsity.text_predictor)
    return policy


def describe(name: str, arguments: dict[str, Any]) -> str:
    """The inverse of `parse_policy`."""
    return ",".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def arguments_of(name: str) -> list[str]:
    """What a policy's arguments are called; of a combination, all of its parts'."""
    found: list[str] = []
    for part in _parts(name):
        found += [field for field in _names(_class_of(part, SparsityConfig())) if field not in found]
    return found


def _one(name: str, arguments: dict[str, Any], sparsity: SparsityConfig) -> Policy:
    policy = _class_of(name, sparsity)
    known = _names(policy)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise UserError(f"{name}: no argument {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    budgets = [argument for argument in _EXCLUSIVE if argument in arguments]
    if "keep" in known and len(budgets) > 1:
        raise UserError(f"{name}: {' and '.join(budgets)} say the same thing; give one")
    defaults = {key: getattr(sparsity, setting) for key, setting in SHARED.items() if key in known}
    if policy.own_budget:
        del defaults["keep"]
    made = policy(**{**defaults, **arguments})
    made.check()
    return made


def _class_of(name: str, sparsity: SparsityConfig) -> type[Policy]:
    if name == LEARNED:
        name = "image" if sparsity.mode == "image" or not sparsity.text_predictor else "image_text"
    if name not in POLICIES:
        known = ", ".join([*POLICIES, LEARNED])
        raise UserError(f"policy: unknown value {name!r}; choose one of {known}, or several joined by +")
    return POLICIES[name]


def _parts(name: str) -> list[str]:
    """``fastv+h2o`` -> both; the + that ends ``prumerge+`` belongs to it."""
    return re.split(r"\+(?=[^+])", name)


def _names(policy: type[Policy]) -> list[str]:
    return [field.name for field in fields(policy)]


def _distribute(name: str, parts: list[str], arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of a combination to its parts: `fastv.r` to fastv, `k` to whom it fits, never to two that differ in meaning."""
    given: dict[str, dict[str, Any]] = {part: {} for part in parts}
    if len(given) < len(parts):
        raise UserError(f"{name}: names a policy twice")
    known = {part: arguments_of(part) for part in parts}
    for key, value in arguments.items():
        part, dot, argument = key.rpartition(".")
        if dot:
            if part not in given:
                raise UserError(f"{name}: {key} names no part of it; the parts are {', '.join(parts)}")
            given[part][argument] = value
            continue
        owners = [part for part in parts if key in known[part]]
        if not owners:
            raise UserError(f"{name}: no argument {key!r}; it has {', '.join(arguments_of(name))}")
        if len(owners) > 1 and key not in SHARED:
            raise UserError(
                f"{name}: {key} is an argument of {' and '.join(owners)}; write {owners[0]}.{key} or {owners[1]}.{key}"
            )
        for owner in owners:
            given[owner][key] = value
    return given


def _number(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
