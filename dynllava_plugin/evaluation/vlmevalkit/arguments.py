"""The options of `run_vlmevalkit.py`: ours, and the kit's that we need to know about."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.requests import MAX_NEW_TOKENS
from dynllava_plugin.evaluation.options import add_flags, checked, option
from dynllava_plugin.evaluation.settings import ModelSettings, RunSettings
from dynllava_plugin.sparsity.config import MODES

KIT_MODES = ("all", "infer", "eval")


@dataclass(frozen=True)
class KitSettings(RunSettings):
    """How `run_vlmevalkit.py` asks; the kit is told the limit too."""

    max_new_tokens: int = option(
        f"of an answer (default: {MAX_NEW_TOKENS})", int, default=MAX_NEW_TOKENS, least=1
    )
    data_root: Path | None = option(
        "folder of the datasets' TSV files, taken as they are: no checksum, no download (default: $LMUData, "
        "checked by the kit)",
        Path,
        metavar="DIR",
    )

    def labels(self) -> list[str]:
        changed = self.max_new_tokens != MAX_NEW_TOKENS
        return super().labels() + ([f"max-new-tokens-{self.max_new_tokens}"] if changed else [])


def settings_of(own: argparse.Namespace) -> tuple[ModelSettings, KitSettings, str | None]:
    """Return what was typed: the model's settings, how it is asked, and the kit's own mode.

    Raises
    ------
    UserError
        Naming the flag that is wrong.
    """
    mode, kit_mode = split_modes(own.mode or [])
    model = {item.name: getattr(own, item.name) for item in fields(ModelSettings)}
    asked = {
        item.name: checked(item, getattr(own, item.name), Path("--data"))
        for item in fields(KitSettings)
        if getattr(own, item.name) is not None
    }
    return ModelSettings.from_dict({**model, "mode": mode}), KitSettings(**asked), kit_mode


def own_parser() -> argparse.ArgumentParser:
    """Return a parser of our options; all others go on to the kit."""
    parser = argparse.ArgumentParser(
        prog="run_vlmevalkit.py",
        description="VLMEvalKit with --model dynllava. Options of ours:",
        allow_abbrev=False,
        add_help=False,
    )
    both = f"{'|'.join(MODES)} for the model; {'|'.join(KIT_MODES)} is the kit's own; once for each"
    add_flags(parser, fields(ModelSettings), mode={"action": "append", "help": both, "type": str})
    add_flags(parser, fields(KitSettings))
    return parser


def kit_parser() -> argparse.ArgumentParser:
    """Return a parser of the kit's options that we need to know about; they all go on to the kit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    for name in (
        "config",
        "work-dir",
        "judge",
        "judge-base-url",
        "judge-key",
        "judge-retry",
        "judge-timeout",
    ):
        parser.add_argument(f"--{name}")
    parser.add_argument("--reuse", action="store_true")
    return parser


def split_modes(values: list[str]) -> tuple[str | None, str | None]:
    """Return the two things that `--mode` names, how the model runs and which of the kit's stages: their values differ."""
    ours, kits = [v for v in values if v in MODES], [v for v in values if v in KIT_MODES]
    unknown = [value for value in values if value not in (*MODES, *KIT_MODES)]
    if unknown:
        choices = f"choose {', '.join(MODES)} for the model or {', '.join(KIT_MODES)} for the kit"
        raise UserError(f"--mode: unknown value {unknown[0]!r}; {choices}")
    if len(ours) > 1 or len(kits) > 1:
        raise UserError(f"--mode: {' and '.join(values)} contradict each other")
    return (ours[0] if ours else None), (kits[0] if kits else None)
