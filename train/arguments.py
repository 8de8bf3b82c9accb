"""The command line: the paper's recipe as defaults (arXiv 2412.00876, section 3.3.3 and appendix A.4.2)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.config import SparsityConfig


@dataclass
class ModelArguments:
    """Where to start from, and what is sparsified how much (see `dynllava_plugin.SparsityConfig`)."""

    model_name_or_path: str = field(
        metadata={"help": "A LLaVA-1.5 or Dynamic-LLaVA in any supported layout, or 'tiny'."}
    )
    mode: str = field(default="image_text", metadata={"help": "What to sparsify: 'image' or 'image_text'."})
    sparse_layer: int = field(
        default=2, metadata={"help": "l: the first decoder layer with the reduced context."}
    )
    vision_keep_rate: float = field(
        default=0.2, metadata={"help": "r_I, share of image tokens to keep, in (0, 1]."}
    )
    text_keep_rate: float = field(
        default=0.5, metadata={"help": "r_OT, share of answer tokens to keep, in (0, 1]."}
    )
    min_text_length: int = field(
        default=50, metadata={"help": "LEN_OT: shorter answers are kept whole (tokens)."}
    )
    keep_loss_weight: float = field(
        default=100.0, metadata={"help": "lambda: weight of the two keep losses."}
    )
    predictor_dim: int | None = field(default=None, metadata={"help": "Width of fresh predictors (512)."})
    predictor_heads: int | None = field(default=None, metadata={"help": "Heads of the image predictor (8)."})
    predictor_ffn_dim: int | None = field(
        default=None, metadata={"help": "MLP width of the image predictor (2048)."}
    )
    predictor_layers: int | None = field(
        default=None, metadata={"help": "Blocks of the image predictor (2)."}
    )

    def __post_init__(self) -> None:
        if self.mode == "full":
            raise UserError(
                "--mode full: nothing would be dropped, so there is nothing to train; use image or image_text"
            )
        SparsityConfig.from_dict(self.sparsity())

    def sparsity(self) -> dict[str, Any]:
        """The given `SparsityConfig` fields."""
        known = {item.name for item in fields(SparsityConfig)}
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name in known}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class DataArguments:
    """What to train on."""

    data_path: str = field(metadata={"help": "A mixture in LLaVA's JSON format."})
    image_folder: str = field(metadata={"help": "The folder that the samples' image paths start from."})
    model_max_length: int = field(
        default=2048, metadata={"help": "Longer samples (image tokens included) are skipped and reported."}
    )
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Skip samples whose image can't be decoded, and report how many."}
    )

    def __post_init__(self) -> None:
        if self.model_max_length < 1:
            raise UserError(f"--model_max_length {self.model_max_length}: must be positive")


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the recipe's defaults and its three additions."""

    output_dir: str = field(metadata={"help": "Where the trained model and its logs go."})  # type: ignore[assignment]
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate of the LLM."})
    predictor_learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak learning rate of the predictors."}
    )
    global_batch_size: int = field(
        default=64,
        metadata={"help": "Samples per optimiser step over all processes; sets the gradient accumulation."},
    )
    tau_start: float = field(default=1.0, metadata={"help": "Gumbel-softmax temperature at the start."})
    tau_end: float = field(
        default=0.1, metadata={"help": "Gumbel-softmax temperature at the end (exponential)."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a model that --output_dir already holds."}
    )

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of both learning rates."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Linear warmup: steps, or below 1 a share of all."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Samples per forward pass and device."}
    )
    gradient_accumulation_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Follows from --global_batch_size; refused where it contradicts it."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimiser steps."})
    save_strategy: str = field(
        default="no", metadata={"help": "'steps' or 'epoch' also saves checkpoint-N to resume from."}
    )
    dataloader_num_workers: int = field(
        default=1, metadata={"help": "Processes that decode images, per device."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the data is ours."}
    )
    report_to: str | None = field(  # type: ignore[assignment]
        default="tensorboard" if find_spec("tensorboard") else "none",
        metadata={"help": "'tensorboard' (default where installed), 'wandb', 'none', ..."},
    )

    def __post_init__(self) -> None:
        self.gradient_accumulation_steps = self._accumulation()
        for name in ("learning_rate", "predictor_learning_rate", "tau_start", "tau_end"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be positive")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: must be positive")
        super().__post_init__()
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs but one process: start with `accelerate launch`, or set "
                "CUDA_VISIBLE_DEVICES to one of them"
            )

    def _accumulation(self) -> int:
        # From the launcher's environment: DeepSpeed's plugin reads the result before `world_size` is known.
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.per_device_train_batch_size < 1:
            raise UserError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size}: must be positive"
            )
        together = self.per_device_train_batch_size * world
        steps, rest = divmod(self.global_batch_size, together)
        if steps < 1 or rest:
            raise UserError(
                f"--global_batch_size {self.global_batch_size} is not a multiple of "
                f"--per_device_train_batch_size {self.per_device_train_batch_size} x {world} process(es); "
                "change one of them"
            )
        if self.gradient_accumulation_steps not in (None, steps):
            raise UserError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps} contradicts "
                f"--global_batch_size {self.global_batch_size}, which needs {steps}; leave it out"
            )
        return steps


class _Parser(HfArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists every flag)")


def parse(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Parse the command line; `--config FILE.yaml` gives flags that those of the command line override.

    Raises
    ------
    UserError
        An unknown flag, a missing one, or a value outside its range.
    """
    types = (ModelArguments, DataArguments, RecipeArguments)
    parser = _Parser(types, allow_abbrev=False, description=__doc__)  # type: ignore[arg-type]
    parser.add_argument(
        "--config", help="A YAML file of flags (without the dashes); the command line overrides it."
    )
    given = list(sys.argv[1:] if argv is None else argv)
    given = config_flags(given) + given
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
    """The flags of the YAML file after `--config`, as a command line."""
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
