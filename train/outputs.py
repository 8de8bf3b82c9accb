"""What a run leaves behind: its log as a table, and the model, whole or not at all."""

from __future__ import annotations

import csv
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from dynllava_plugin.errors import UserError

COLUMNS = (
    *("step", "epoch", "seconds", "loss", "lm_loss", "image_keep_loss", "text_keep_loss"),
    *("image_keep_rate", "text_keep_rate", "tau", "lr_llm", "lr_predictor", "grad_norm"),
)


class CsvLog(TrainerCallback):
    """`train_log.csv`: one row per logged step, one column per quantity (empty: no long answer in it)."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path, self.append = path, append
        self.start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the table; a resumed run goes on with the old one."""
        self.start = time.monotonic()
        if state.is_world_process_zero and not (self.append and self.path.exists()):
            self._write("w", COLUMNS)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add a row."""
        if state.is_world_process_zero and "lm_loss" in logs:
            row = {**logs, "step": state.global_step, "seconds": round(time.monotonic() - self.start, 2)}
            self._write("a", [row.get(name, "") for name in COLUMNS])

    def _write(self, how: str, row: Any) -> None:
        with self.path.open(how, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)


def prepare_output_dir(output_dir: str, overwrite: bool) -> Path:
    """Make the folder and check that a run may write there, before hours are spent.

    Raises
    ------
    UserError
        It holds a model already (and `overwrite` is false), or can't be written to.
    """
    folder = Path(output_dir)
    if (folder / "config.json").exists() and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} already holds a model; choose another or --overwrite_output_dir true"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot write there ({error.strerror})") from None
    return folder


def make_savable(model: Any) -> None:
    """Vicuna's generation settings (a temperature, no sampling) would be refused when saving."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def save_model(trainer: Trainer, output_dir: Path, bf16: bool) -> None:
    """Save model and processor so that `load_model(output_dir)` finds all of them or nothing.

    They are written to a folder beside their place, then moved with `config.json` last: without it the folder
    is no checkpoint. A run with `--bf16` keeps float32 weights while it trains and saves bfloat16.
    """
    if bf16 and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        trainer.model.to(torch.bfloat16)
    temporary = output_dir / ".model"
    trainer.save_model(str(temporary))  # on every process: sharded weights are gathered
    if trainer.is_world_process_zero():
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle: nobody should load it
        (output_dir / "config.json").unlink(missing_ok=True)
        for stale in output_dir.glob("*.safetensors*"):
            stale.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            os.replace(path, output_dir / path.name)
        shutil.rmtree(temporary)
    trainer.accelerator.wait_for_everyone()
