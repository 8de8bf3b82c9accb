"""What a run leaves behind: its log as a table, and the model, whole or not at all."""

from __future__ import annotations

import copy
import csv
import errno
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import check_folder, write_text
from train.adapters import ADAPTER_PARTS, is_adapted, save_adapter
from train.agreement import together
from train.writing import naming_the_file

PARTIAL_MODEL = ".model"
LAST = "config.json"  # without it a folder is no checkpoint


class Table(NamedTuple):
    """A log as a table: its file, the quantity that makes a line of Trainer's log a row of it, its columns."""

    file: str
    belongs: str
    columns: tuple[str, ...]


TRAINING = Table(
    "train_log.csv",
    "lm_loss",
    (
        *("step", "epoch", "seconds", "loss", "lm_loss", "image_keep_loss", "text_keep_loss"),
        *("image_keep_rate", "image_keep_rate_std", "text_keep_rate", "text_keep_rate_std", "tau"),
        *("prompt_keep_loss", "prompt_keep_rate", "prompt_keep_rate_std"),
        *("lr_llm", "lr_predictor", "grad_norm", "samples_per_second", "tokens_per_second"),
        *("peak_memory_gib", "hours_left"),
    ),
)
EVALUATION = Table(
    "eval_log.csv",
    "eval_ppl",
    (
        *("step", "epoch", "seconds", "eval_accuracy", "eval_ppl", "eval_kept_image_share"),
        *("eval_kept_output_share", "eval_samples", "eval_seconds"),
    ),
)


class CsvLog(TrainerCallback):
    """Writes tables: one row per logged step, one column per quantity (empty: not there in this row).

    Parameters
    ----------
    folder : Path
    tables : sequence of Table
    """

    def __init__(self, folder: Path, tables: Sequence[Table]) -> None:
        self.folder, self.tables = folder, tables
        self.start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the tables; a resumed run keeps the rows of the steps it doesn't repeat, and its clock goes on."""
        self.start = time.monotonic()
        if not state.is_world_process_zero:
            return
        spent = 0.0
        for table in self.tables:
            path, rows = self.folder / table.file, []
            if state.global_step and path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    rows = [row for row in csv.DictReader(file) if (row["step"] or "x").isdigit()]
            rows = [row for row in rows if int(row["step"]) <= state.global_step]
            spent = max([spent, *(float(row["seconds"] or 0) for row in rows)])
            text = io.StringIO(newline="")
            csv.writer(text).writerows(
                [table.columns, *([row.get(name) for name in table.columns] for row in rows)]
            )
            with naming_the_file(path):
                write_text(path, text.getvalue())
        self.start -= spent

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add a row."""
        for table in self.tables if state.is_world_process_zero else ():
            if table.belongs in logs:
                row = {**logs, "step": state.global_step, "seconds": round(time.monotonic() - self.start, 2)}
                path = self.folder / table.file
                with naming_the_file(path), path.open("a", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerow([row.get(name, "") for name in table.columns])


def prepare_output_dir(output_dir: str, overwrite: bool, bases: Sequence[Path] = ()) -> Path:
    """Make the folder and check that a run may write there, before hours are spent.

    Parameters
    ----------
    output_dir : str
    overwrite : bool
        A model that it holds may be replaced.
    bases : sequence of Path
        Folders of weights that the run, or the adapter it saves, starts from.

    Raises
    ------
    UserError
        It holds a model already (and `overwrite` is false), is one of `bases`, or can't be written to.
    """
    folder = Path(output_dir)
    if any(folder.resolve() == base.resolve() for base in bases):
        raise UserError(
            f"--output_dir {output_dir} is the folder of the model that the run starts from; choose another"
        )
    if (folder / "config.json").exists() and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} already holds a model; choose another or --overwrite_output_dir true"
        )
    check_folder("--output_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def held(folder: Path, by_this_process: bool) -> Iterator[None]:
    """Hold an output folder for this run until the block ends or the process does, killed or not.

    Raises
    ------
    UserError
        Another run holds it; all processes raise it, though one (`by_this_process`) holds the folder for all.
    """
    path = folder / ".lock"
    file = path.open("a") if by_this_process else None

    def take() -> None:
        try:
            if file is not None:  # of a kind that processes forked to load data don't go on holding
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the disk knows no locks
                raise UserError(
                    f"--output_dir {folder}: another run is writing there; choose another"
                ) from None

    try:
        together(take)
        yield
        if file is not None:
            path.unlink(missing_ok=True)
    finally:
        if file is not None:
            file.close()


def make_savable(model: Any) -> None:
    """Vicuna's generation settings (a temperature, no sampling) would be refused when saving."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def save_model(trainer: Any, output_dir: Path, dtype: torch.dtype) -> None:
    """Save model and processor so that `load_model(output_dir)` finds all of them or nothing.

    They are written to a folder beside their place, then moved with `config.json` last: without it the folder
    is no checkpoint. A run with LoRA saves adapter and predictors instead of the model. Called on every process,
    since sharded weights have to be gathered.

    Parameters
    ----------
    trainer : DynamicLlavaTrainer
    output_dir : Path
    dtype : torch.dtype
        Of the file; a run keeps float32 weights while it trains.
    """
    temporary = output_dir / PARTIAL_MODEL
    adapted = is_adapted(trainer.model)
    weights = gather_weights(trainer, dtype, ADAPTER_PARTS if adapted else ("",))
    if trainer.args.should_save:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if adapted:
            save_adapter(trainer.model, weights, temporary)
            config = copy.deepcopy(trainer.dynamic.config)
            vars(config).pop("quantization_config", None)  # the adapter belongs to the whole weights
            config.save_pretrained(temporary)
        else:
            trainer.dynamic.save_pretrained(temporary, state_dict=weights)
        trainer.processing_class.save_pretrained(temporary)
        _state_dtype(temporary / LAST, str(dtype).removeprefix("torch."))
        (output_dir / LAST).unlink(missing_ok=True)
        for stale in [*output_dir.glob("*.safetensors*"), *output_dir.glob("adapter_config.json")]:
            stale.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == LAST, path.name)):
            os.replace(path, output_dir / path.name)
        shutil.rmtree(temporary)
    trainer.accelerator.wait_for_everyone()


def gather_weights(trainer: Any, dtype: torch.dtype, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the state dict, of names with any of `parts`, on the process that saves; {} elsewhere.

    Every process takes part: sharded weights are put together one tensor at a time. Floating tensors are `dtype`.
    """
    if trainer.is_deepspeed_enabled:
        found = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    else:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        found = model.state_dict()
    weights = {}
    for name, tensor in found.items():
        if not any(part in name for part in parts):
            continue
        if isinstance(tensor, DTensor):
            tensor = tensor.to(trainer.args.device).full_tensor()
        if trainer.args.should_save:
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
    return weights


def _state_dtype(config_file: Path, dtype: str) -> None:
    """config.json names the dtype the model had in training; it must name that of the file."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
