"""The run manifest `dynllava_run.json` as tables read it: what ran, where, how many tokens were kept, and what the run is called."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.evaluation.engine.requests import MAX_NEW_TOKENS
from dynllava_plugin.evaluation.settings import SPARSITY_KEYS
from dynllava_plugin.policies.registry import arguments_of, describe, parse_policy

NAME = "dynllava_run.json"
# Parts that are read, and what each of them is where it is there.
_OBJECTS = "settings sparsity model tokens scored versions host judge questions unmatched".split()
_OF_TASKS = ("tokens", "scored")
_TEXTS = ("checkpoint_hash", "prompts", "commit", "harness")
_USUAL_RATE = 0.2  # of image tokens; a name tells another one
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


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object that a harness or a run of ours wrote; anything else is a `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"not a readable JSON file ({one_line(error)})"
        raise UserError(f"{path}: {problem}; delete it or run the evaluation again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a harness's results; delete it or name another folder")
    return content


def number(value: Any) -> float | None:
    """Return a finite number; None for everything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a run's manifest; empty where there is none.

    Raises
    ------
    UserError
        For a file that isn't one, or has a part of another type than such a file has.
    """
    if not path.exists():
        return {}
    content = read_object(path)
    wrong = [name for name in _OBJECTS if not isinstance(content.get(name), (dict, type(None)))]
    wrong += [name for name in _TEXTS if not isinstance(content.get(name), (str, type(None)))]
    for name in (part for part in _OF_TASKS if part not in wrong):
        parts = (content.get(name) or {}).values()
        wrong += [name] if not all(isinstance(part, dict) for part in parts) else []
    seconds = content.get("seconds")
    wrong += ["seconds"] if seconds is not None and number(seconds) is None else []
    if wrong:
        raise UserError(f"{path}: not a run's manifest ({wrong[0]} is something else); delete it")
    return content


def beside(results_file: Path) -> Path:
    """Return where the manifest of lmms-eval's ``<date>_results.json`` lies: ``<date>_dynllava_run.json``."""
    return results_file.with_name(f"{results_file.name.removesuffix('_results.json')}_{NAME}")


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
        "video_frames": "{} frames of a video",
    }
    said = [text.format(given[name]) for name, text in names.items() if given.get(name) is not None]
    return f" ({', '.join(said)})" if said else ""


def _from_arguments(model_args: str, otherwise: str) -> tuple[dict[str, Any], str]:
    pairs = dict(part.split("=", 1) for part in str(model_args).split(",") if "=" in part)
    checkpoint = Path(pairs.pop("pretrained", otherwise)).name
    sparsity: dict[str, Any] = {key: pairs.pop(key) for key in SPARSITY_KEYS if key in pairs}
    for other in ("device", "dtype", "attn_implementation", "batch_size", "max_batch_size"):
        pairs.pop(other, None)
    return {**sparsity, "policy_args": pairs} if "policy" in sparsity else sparsity, checkpoint


def _number(sparsity: dict[str, Any], key: str, means_something: bool) -> float | None:
    return float(sparsity[key]) if means_something and key in sparsity else None


def mode_name(sparsity: dict[str, Any]) -> str:
    """Return a run's name in tables: ``image_text``, ``random`` (the control), ``...@10%`` at another keep rate."""
    if sparsity.get("policy"):
        return _policy_name(sparsity)
    mode = str(sparsity.get("mode", "unknown"))
    if mode == "full":
        return mode
    if sparsity.get("image_policy", "learned") != "learned":
        # The control: the same checkpoint and mode, but another chooses the image tokens.
        mode = str(sparsity["image_policy"]) if mode == "image_text" else f"{sparsity['image_policy']}_{mode}"
    rate = float(sparsity.get("vision_keep_rate", _USUAL_RATE))
    return mode if rate == _USUAL_RATE else f"{mode}@{100 * rate:g}%"


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


def _policy_name(sparsity: dict[str, Any]) -> str:
    """``fastv,k=3,r=0.75``; ``visionzip@10%`` where the keep rate is the model's setting."""
    label = policy_label(sparsity)
    rate = float(sparsity.get("vision_keep_rate", _USUAL_RATE))
    return label if rate == _USUAL_RATE or not uses_keep_rate(sparsity) else f"{label}@{100 * rate:g}%"


def _policy(sparsity: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return parse_policy(describe(str(sparsity["policy"]), sparsity.get("policy_args") or {}))


def _bare(arguments: dict[str, Any]) -> set[str]:
    """The arguments' names without the part of a combination that they are for."""
    return {key.rpartition(".")[2] for key in arguments}
