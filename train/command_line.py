"""The command line: flags, and presets of flags as YAML files."""

from __future__ import annotations

import json
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from dynllava_plugin.errors import UserError
from train.arguments import AdapterArguments, DataArguments, ModelArguments, RecipeArguments

USAGE = "accelerate launch train/finetune.py [PRESET.yaml] --data_path FILE.json --image_folder DIR --output_dir DIR [flags]"
DESCRIPTION = (
    "From a VLM to one that drops tokens. Flags override the preset (train/configs/); see docs/training.md."
)
PRESET_SUFFIXES = (".yaml", ".yml")


class _Parser(HfArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists every flag)")


def parse(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, RecipeArguments, AdapterArguments]:
    """Parse the command line; a preset (`FILE.yaml` first, or `--config FILE.yaml`) gives flags it overrides.

    Raises
    ------
    UserError
        An unknown flag, a missing one, or a value outside its range.
    """
    types = (ModelArguments, DataArguments, RecipeArguments, AdapterArguments)
    parser = _Parser(types, allow_abbrev=False, usage=USAGE, description=DESCRIPTION)  # type: ignore[arg-type]
    parser.add_argument(
        "--config", help="A YAML file of flags (without the dashes); the command line overrides it."
    )
    parser._option_string_actions[
        "--resume_from_checkpoint"
    ].help = "A checkpoint elsewhere to start from, until the run has a newer one of its own (it goes on from those by itself)."
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0].endswith(PRESET_SUFFIXES):
        given.insert(0, "--config")
    # Deprecated under its older name, the only one that transformers before 5.23 know.
    name = "activation" if "--activation_checkpointing" in parser._option_string_actions else "gradient"
    given = [
        re.sub("^--(activation|gradient)_checkpointing", f"--{name}_checkpointing", word)
        for word in config_flags(given) + given
    ]
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except ValueError as error:  # TrainingArguments' own checks
        raise UserError(" ".join(str(error).split())) from None
    if unknown:
        close = get_close_matches(unknown[0], parser._option_string_actions, n=1)
        hint = f"; did you mean {close[0]}?" if close else " (--help lists every flag)"
        raise UserError(f"{unknown[0]}: no such flag{hint}")
    return tuple(parsed)  # type: ignore[return-value]


def config_flags(argv: list[str]) -> list[str]:
    """Return the flags of the YAML file after `--config`, as a command line."""
    flags: list[str] = []
    for place, word in enumerate(argv):
        if word != "--config" and not word.startswith("--config="):
            continue
        name = word.partition("=")[2] or "".join(argv[place + 1 : place + 2])
        try:
            values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"--config {name}: not a readable YAML file ({' '.join(str(error).split())})"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"--config {name}: must hold `flag: value` lines")
        for flag, value in values.items():
            if value is not None:
                items = value if isinstance(value, list) else [value]
                words = [json.dumps(item) if isinstance(item, (dict, bool)) else str(item) for item in items]
                flags += [f"--{flag}", *words]
    return flags
