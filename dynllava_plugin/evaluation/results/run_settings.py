"""What tells one run from another: its checkpoint and its settings, from its manifest, and what tables call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.evaluation.engine.requests import MAX_NEW_TOKENS
from dynllava_plugin.evaluation.settings import SPARSITY_KEYS
from dynllava_plugin.policies.registry import arguments_of, describe, parse_policy

# Columns of the tidy table beside the names of a row.
SETTINGS = (
    "checkpoint_hash",
    "policy",
    "vision_keep_rate",
    "text_keep_rate",
    "image_policy",
    "random_seed",
    "dtype",
    "attn_implementation",
    "prompts",
    "generation",
)
# Options of lmms-eval's that change what is asked or how.
_CHANGES_ANSWERS = (
    "offset",
    "num_fewshot",
    "system_instruction",
    "apply_chat_template",
    "fewshot_as_multiturn",
)
# Of these a table says what a run had only where its runs differ in it.
_SHOWN_WHERE_DIFFERENT = {
    "random_seed": "seed {:.0f}",
    "dtype": "{}",
    "attn_implementation": "{}",
    "prompts": "{} prompts",
    "generation": "{}",
}


def generation_label(config: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    """Return what a run asked for beyond its tasks' own generation, questions and prompts: ``temperature=0.7, offset=8``.

    Parameters
    ----------
    config : dict
        Of lmms-eval's results file; empty for VLMEvalKit.
    manifest : dict
        VLMEvalKit's tell a limit of new tokens that isn't the usual one.
    """
    given = config.get("gen_kwargs") or {}
    asked = dict(given) if isinstance(given, dict) else {"gen_kwargs": given}
    command = config.get("resolved_cli_args") or {}
    asked |= {name: command[name] for name in _CHANGES_ANSWERS if command.get(name)}
    if asked.get("do_sample"):
        asked["seed"] = config.get("torch_seed")
    if (limit := manifest.get("max_new_tokens")) not in (None, MAX_NEW_TOKENS):
        asked["max_new_tokens"] = limit
    return ", ".join(f"{name}={asked[name]}" for name in sorted(asked)) or None


def run_settings(
    manifest: dict[str, Any], model_args: str, path: Path, generation: str | None = None
) -> dict[str, Any]:
    """Return ``checkpoint``, ``mode``, `SETTINGS` and ``seconds`` of a run.

    Parameters
    ----------
    manifest : dict
        The run's ``dynllava_run.json``; empty where there is none.
    model_args : str
        lmms-eval's, which tell a little of a run without a manifest.
    path : Path
        The harness's results file.
    generation : str, optional
        `generation_label` of the run.
    """
    given = manifest.get("settings") or {}
    if manifest:
        sparsity = manifest.get("sparsity") or {}
        checkpoint = given.get("checkpoint", "unknown") + _asked_otherwise(given)
    else:
        sparsity, checkpoint = _from_arguments(model_args, path.parent.name)
    loaded = manifest.get("model") or {}  # what was in force, not only what was asked for
    by_policy = bool(sparsity.get("policy"))
    # Output text is dropped in one mode only: elsewhere its keep rate says nothing about the run.
    drops_text = sparsity.get("mode") == "image_text" and not by_policy
    drops_image = sparsity.get("mode") != "full" and not by_policy
    return {
        "checkpoint": checkpoint,
        "mode": mode_name(sparsity),
        "checkpoint_hash": manifest.get("checkpoint_hash"),
        "policy": policy_label(sparsity) if by_policy else None,
        "vision_keep_rate": _number(sparsity, "vision_keep_rate", uses_keep_rate(sparsity)),
        "text_keep_rate": _number(sparsity, "text_keep_rate", drops_text),
        "image_policy": sparsity.get("image_policy") if drops_image else None,
        "random_seed": _number(sparsity, "random_seed", draws_from_seed(sparsity)),
        "dtype": loaded.get("dtype") or given.get("dtype"),
        "attn_implementation": loaded.get("attn_implementation") or given.get("attn_implementation"),
        "prompts": manifest.get("prompts"),
        "generation": generation,
        "seconds": manifest.get("seconds"),
    }


def _asked_otherwise(given: dict[str, Any]) -> str:
    """What is said behind a checkpoint's name where it was given a system prompt or limits of pixels of the user's."""
    names = {
        "system_prompt": "system prompt {!r}",
        "min_pixels": "at least {} pixels",
        "max_pixels": "at most {} pixels",
    }
    said = [text.format(given[name]) for name, text in names.items() if given.get(name) is not None]
    return f" ({', '.join(said)})" if said else ""


def told_apart(table: pd.DataFrame) -> pd.DataFrame:
    """Return the tidy table with `checkpoint` and `mode` spelled out where two runs differ in nothing else that is shown.

    Two checkpoints of one name get their hashes, two runs of one mode their data types, prompts and so on. The
    mode as it was is in the column ``method``.
    """
    table = table.assign(method=table["mode"])
    hashes = (
        table.fillna({"checkpoint_hash": ""}).groupby("checkpoint")["checkpoint_hash"].transform("nunique")
    )
    several = (hashes > 1) & table["checkpoint_hash"].notna()
    table.loc[several, "checkpoint"] += " (" + table.loc[several, "checkpoint_hash"].astype(str) + ")"
    for column, text in _SHOWN_WHERE_DIFFERENT.items():
        # A run that asked for nothing is a run of its own beside one that did; elsewhere nothing means not known.
        if table[column].nunique(dropna=column != "generation") > 1:
            known = table[column].notna()
            table.loc[known, "mode"] += [", " + text.format(value) for value in table.loc[known, column]]
    return table


def _from_arguments(model_args: str, otherwise: str) -> tuple[dict[str, Any], str]:
    pairs = dict(part.split("=", 1) for part in str(model_args).split(",") if "=" in part)
    checkpoint = Path(pairs.pop("pretrained", otherwise)).name
    sparsity: dict[str, Any] = {key: pairs.pop(key) for key in SPARSITY_KEYS if key in pairs}
    for other in ("device", "dtype", "attn_implementation", "batch_size", "max_batch_size"):
        pairs.pop(other, None)
    return {**sparsity, "policy_args": pairs} if "policy" in sparsity else sparsity, checkpoint


def _number(sparsity: dict[str, Any], key: str, means_something: bool) -> float | None:
    return float(sparsity[key]) if means_something and key in sparsity else None


def mode_name(sparsity: dict[str, Any], default_rate: float = 0.2) -> str:
    """Return a run's name in tables: ``image_text``, ``random`` (the control), ``...@10%`` at another keep rate."""
    if sparsity.get("policy"):
        return _policy_name(sparsity, default_rate)
    mode = str(sparsity.get("mode", "unknown"))
    if mode == "full":
        return mode
    if sparsity.get("image_policy", "learned") != "learned":
        # The control: the same checkpoint and mode, but another chooses the image tokens.
        mode = str(sparsity["image_policy"]) if mode == "image_text" else f"{sparsity['image_policy']}_{mode}"
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    return mode if rate == default_rate else f"{mode}@{100 * rate:g}%"


def policy_label(sparsity: dict[str, Any]) -> str:
    """Return a policy with its arguments, as on the command line: ``fastv,k=3,r=0.75``."""
    return describe(*_policy(sparsity))


def uses_keep_rate(sparsity: dict[str, Any]) -> bool:
    """Whether the model's `vision_keep_rate` says how many image tokens stay."""
    if not sparsity.get("policy"):
        return sparsity.get("mode") != "full"
    name, arguments = _policy(sparsity)
    return "keep" in arguments_of(name) and not {"keep", "r", "n"} & _bare(arguments)


def draws_from_seed(sparsity: dict[str, Any]) -> bool:
    """Whether the model's `random_seed` decides anything."""
    if not sparsity.get("policy"):
        return sparsity.get("image_policy") == "random" and sparsity.get("mode") != "full"
    name, arguments = _policy(sparsity)
    return "seed" in arguments_of(name) and "seed" not in _bare(arguments)


def _policy_name(sparsity: dict[str, Any], default_rate: float) -> str:
    """``fastv,k=3,r=0.75``; ``visionzip@10%`` where the keep rate is the model's setting."""
    label = policy_label(sparsity)
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    return label if rate == default_rate or not uses_keep_rate(sparsity) else f"{label}@{100 * rate:g}%"


def _policy(sparsity: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return parse_policy(describe(str(sparsity["policy"]), sparsity.get("policy_args") or {}))


def _bare(arguments: dict[str, Any]) -> set[str]:
    """The arguments' names without the part of a combination that they are for."""
    return {key.rpartition(".")[2] for key in arguments}
