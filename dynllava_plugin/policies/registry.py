"""Every policy by its name, and from a name and arguments to a policy."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import ImagePolicy, Part
from dynllava_plugin.policies.cdpruner import CDPruner
from dynllava_plugin.policies.dart import DART
from dynllava_plugin.policies.divprune import DivPrune
from dynllava_plugin.policies.downsample import Downsample
from dynllava_plugin.policies.fastervlm import FasterVLM
from dynllava_plugin.policies.fastv import FastV
from dynllava_plugin.policies.h2o import H2O
from dynllava_plugin.policies.hiprune import HiPrune
from dynllava_plugin.policies.holov import HoloV
from dynllava_plugin.policies.learned import Full, LearnedImage, LearnedImageText, LearnedPrompt, LearnedText
from dynllava_plugin.policies.policy import Policy
from dynllava_plugin.policies.prumerge import PruMergePlus
from dynllava_plugin.policies.pyramiddrop import PyramidDrop
from dynllava_plugin.policies.pyramidkv import PyramidKV
from dynllava_plugin.policies.random import RandomImage, RandomText
from dynllava_plugin.policies.schedule import Schedule
from dynllava_plugin.policies.snapkv import SnapKV
from dynllava_plugin.policies.sparsevlm import SparseVLM
from dynllava_plugin.policies.structure import Structure
from dynllava_plugin.policies.v2drop import V2Drop
from dynllava_plugin.policies.visionzip import VisionZip
from dynllava_plugin.policies.vispruner import VisPruner
from dynllava_plugin.sparsity.config import SparsityConfig

POLICIES: dict[str, type[Part]] = {
    policy.name: policy
    for policy in (
        Full,
        LearnedImage,
        LearnedImageText,
        LearnedText,
        FastV,
        PyramidDrop,
        SparseVLM,
        V2Drop,
        DART,
        H2O,
        SnapKV,
        PyramidKV,
        RandomImage,
        RandomText,
        Structure,
        Downsample,
        VisionZip,
        FasterVLM,
        VisPruner,
        HoloV,
        HiPrune,
        DivPrune,
        CDPruner,
        PruMergePlus,
        Schedule,
    )
}
LEARNED = "learned"
# Arguments that default to the model's setting of another name.
SHARED = {
    "keep": "vision_keep_rate",
    "layer": "sparse_layer",
    "start_layer": "sparse_layer",
    "seed": "random_seed",
    "later": "later_gates",
}
_EXCLUSIVE = ("keep", "r", "n", "ratio", "shares", "tokens", "threshold")  # ways to give one budget


def policy_of(sparsity: SparsityConfig) -> Policy:
    """Return the policy that the settings name; without `policy`, the one that `mode` and `image_policy` stand for.

    Raises `UserError` for an unknown policy or argument (the known ones are listed), or a combination that decides
    something twice.
    """
    name = sparsity.policy
    if name is None:
        name = sparsity.mode
        if name != "full" and sparsity.image_policy == "random":
            name = "random" if name == "image" else "random+text"
    settings = tuple(getattr(sparsity, setting) for setting in SHARED.values())
    learned_text = sparsity.mode != "image" and sparsity.text_predictor
    if any(isinstance(value, (list, dict)) for value in sparsity.policy_args.values()):
        raise UserError(f"{name}: its arguments must be numbers or text, not {sparsity.policy_args}")
    made = _policy(name, tuple(sparsity.policy_args.items()), settings, learned_text)
    return replace(made, prompt=LearnedPrompt(layer=sparsity.sparse_layer)) if sparsity.drops_prompt else made


@lru_cache(maxsize=64)  # asked for in every decoding step
def _policy(
    name: str, arguments: tuple[tuple[str, Any], ...], settings: tuple[Any, ...], learned_text: bool
) -> Policy:
    name = "+".join(_meant(part, learned_text) for part in _parts(name))
    parts = _parts(name)
    defaults = dict(zip(SHARED, settings, strict=True))
    given = _distribute(name, parts, dict(arguments)) if len(parts) > 1 else {name: dict(arguments)}
    made: list[Part] = []
    # Without a layer of their own (chance, the cache): they act where the others do.
    followers: list[int] = []
    for part in parts:
        for method in _methods(part):
            if method.layer_argument and method.follows and method.layer_argument not in given[part]:
                followers.append(len(made))
            made.append(_one(part, method, given[part], defaults))
    leaders = {one.layers[0] for i, one in enumerate(made) if one.layer_argument and i not in followers}
    if len(leaders) == 1:
        for i in followers:
            made[i] = replace(made[i], **{str(made[i].layer_argument): min(leaders)})
    return Policy.of(name, made)


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """Return ("fastv", {"k": 3, "r": 0.75}) of ``"fastv,k=3,r=0.75"``, as policies are written on every command line.

    Steps of a schedule may stand without their argument's name: ``"schedule,2:fastv:0.5,6:random:0.3"`` is
    ``"schedule,steps=2:fastv:0.5-6:random:0.3"``.
    """
    name, *pairs = [part.strip() for part in text.split(",")]
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if ":" in pair and not equals:
            arguments["steps"] = "-".join([*map(str, filter(None, [arguments.get("steps")])), pair])
        elif not equals or not key or not value:
            raise UserError(f"policy: {pair!r} in {text!r} is not argument=value")
        else:
            arguments[key] = _number(value)
    return name, arguments


def policy_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """Return what a user gives, `policy="fastv,k=3"` or `policy="fastv", k=3`, as changes of a `SparsityConfig`.

    Raises `UserError` for a policy beside a mode or an image policy.
    """
    if changes.get("policy") is None:
        return changes
    settings = {field.name for field in fields(SparsityConfig)}
    name, arguments = parse_policy(str(changes["policy"]))
    for other in ("mode", "image_policy"):
        if changes.get(other) is not None:
            raise UserError(f"{other}: policy={name} says what is dropped; give one of the two")
    arguments |= changes.get("policy_args") or {}
    arguments |= {key: value for key, value in changes.items() if key not in settings}
    return {
        **{key: value for key, value in changes.items() if key in settings},
        "policy": name,
        "policy_args": arguments,
    }


def check_policy(sparsity: SparsityConfig, num_layers: int | None = None) -> Policy:
    """Return the policy of the settings, which fit it and a model of `num_layers` layers, or a `UserError`."""
    sparsity.validate(num_layers)
    policy = policy_of(sparsity)
    if num_layers is not None:
        policy = policy.of_depth(num_layers)
    policy.check(sparsity.text_predictor)
    return policy


def describe(name: str, arguments: dict[str, Any]) -> str:
    """Write a policy as `parse_policy` reads it."""
    return ",".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def arguments_of(name: str) -> list[str]:
    """Return what a policy's arguments are called; of a combination, all of its parts'."""
    methods = [method for part in _parts(name) for method in _methods(_meant(part, True))]
    return list(dict.fromkeys(argument for method in methods for argument in _names(method)))


def _one(name: str, method: type[Part], arguments: dict[str, Any], defaults: dict[str, Any]) -> Part:
    """Return the method of the part `name` with those of the part's arguments that are its own."""
    known, all_known = _names(method), arguments_of(name)
    unknown = sorted(set(arguments) - set(all_known))
    if unknown:
        raise UserError(f"{name}: no argument {unknown[0]!r}; it has {', '.join(all_known) or 'none'}")
    budgets = [argument for argument in _EXCLUSIVE if argument in arguments]
    if "keep" in known and len(budgets) > 1:
        raise UserError(f"{name}: {' and '.join(budgets)} say the same thing; give one")
    taken = {key: value for key, value in defaults.items() if key in {field.name for field in fields(method)}}
    if method.layer_argument in arguments:  # which names one gate
        taken.pop("later", None)
    if method.own_budget:
        del taken["keep"]
    taken |= {key: value for key, value in arguments.items() if key in known}
    if method is Schedule:
        taken["steps"] = _steps(str(arguments.get("steps", "")), defaults)
    made = method(**taken)
    made.check()
    return made


def _steps(text: str, defaults: dict[str, Any]) -> tuple[Part, ...]:
    """Return a schedule's steps, written `layer:policy:share-layer:policy:share`, in order; `UserError` for one that can't be."""
    steps: list[Part] = []
    for part in filter(None, text.split("-")):
        layer, _, rest = part.partition(":")
        name, _, keep = rest.partition(":")
        try:
            at, share = int(layer), float(keep)
        except ValueError:
            raise UserError(f"schedule: {part!r} is not layer:policy:share, such as 6:random:0.3") from None
        method, *more = _methods(name)
        image = issubclass(method, ImagePolicy) and method is not Schedule and not more
        if not image or (at > 0) != bool(method.layer_argument):
            acts = "has gates of its own" if image and at > 0 else "doesn't act there"
            raise UserError(
                f"schedule: {part!r}: {name} {acts}; choose an image policy with a layer, or at 0 one before the LLM"
            )
        where = {str(method.layer_argument): at} if at > 0 else {}
        steps.append(_one(name, method, {"keep": share, **where}, defaults))
    if not steps:
        raise UserError("schedule: give its steps, such as schedule,2:fastv:0.5,6:random:0.3")
    return tuple(sorted(steps, key=lambda step: step.layers[0]))


def _meant(name: str, learned_text: bool) -> str:
    """`learned` is both predictors, or the image's where the checkpoint or its mode has no more."""
    return name if name != LEARNED else "image_text" if learned_text else "image"


def _methods(name: str) -> tuple[type[Part], ...]:
    """What a name stands for: one method, or the two of `image_text`."""
    if name not in POLICIES:
        known = ", ".join([*POLICIES, LEARNED])
        raise UserError(f"policy: unknown value {name!r}; choose one of {known}, or several joined by +")
    return POLICIES[name].parts or (POLICIES[name],)


def _parts(name: str) -> list[str]:
    """``fastv+h2o`` -> both; the + that ends ``prumerge+`` belongs to it."""
    return re.split(r"\+(?=[^+])", name)


def _names(method: type[Part]) -> list[str]:
    return [field.name for field in fields(method) if field.metadata.get("argument", True)]


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
