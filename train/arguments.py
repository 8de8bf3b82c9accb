"""A run's arguments: the paper's recipe as defaults (arXiv 2412.00876, section 3.3.3 and appendix A.4.2)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from dynllava_plugin.errors import UserError
from dynllava_plugin.sparsity.config import SparsityConfig

# Flags of TrainingArguments that don't fit here.
REFUSED = {
    "save_only_model": "a checkpoint without optimiser and schedule is none to go on from",
    "remove_unused_columns": "the data is ours, and every column of it is used",
    "label_smoothing_factor": "the recipe's loss is the model's own",
    "auto_find_batch_size": "a step has --global_batch_size samples; choose --per_device_train_batch_size",
    "load_best_model_at_end": "the run's model is its last; --resume_from_checkpoint takes an earlier one",
    "metric_for_best_model": "the run's model is its last, and checkpoints stay by age",
}
LOSS_AVERAGES = ("labels", "batches")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_finite(arguments: Any) -> None:
    """Raise `UserError` for a dataclass's number that is NaN or infinite."""
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{item.name} {value}: must be a finite number")


@dataclass
class ModelArguments:
    """Where to start from, and what is sparsified how much (see `dynllava_plugin.SparsityConfig`)."""

    model_name_or_path: str = HfArg(
        help="A checkpoint of any family that load_model reads (LLaVA-1.5 in any layout), or 'tiny'."
    )
    mode: str = HfArg(default="image_text", help="What to sparsify: 'image' or 'image_text'.")
    sparse_layer: int = HfArg(default=2, help="l: the first decoder layer with the reduced context.")
    vision_keep_rate: str = HfArg(
        default="0.2",
        help="r_I, share of image tokens to keep, in (0, 1]; LOW:HIGH draws one for each sample and tells it the "
        "predictor, so that one checkpoint serves every budget.",
    )
    gates: str | None = HfArg(
        default=None,
        help="LAYER:RATE,LAYER:RATE,...: several gates of the image tokens, each with a predictor of its own, and "
        "which share of what reaches it stays; in place of --sparse_layer and --vision_keep_rate.",
    )
    text_keep_rate: float = HfArg(default=0.5, help="r_OT, share of answer tokens to keep, in (0, 1].")
    min_text_length: int = HfArg(default=50, help="LEN_OT: shorter answers are kept whole (tokens).")
    prompt_keep_rate: float = HfArg(
        default=1.0,
        help="Share of the last question's tokens to keep, in (0, 1], by a predictor of its own (LLaVA-1.5's "
        "prompts); 1, as in the paper's method: prompt text is never dropped.",
    )
    min_prompt_length: int = HfArg(default=10, help="Shorter questions are kept whole (tokens).")
    keep_loss_weight: float = HfArg(default=100.0, help="lambda: weight of the two keep losses.")
    predictor_dim: int | None = HfArg(default=None, help="Width of fresh predictors (512).")
    predictor_heads: int | None = HfArg(default=None, help="Heads of the image predictor (8).")
    predictor_ffn_dim: int | None = HfArg(default=None, help="MLP width of the image predictor (2048).")
    predictor_layers: int | None = HfArg(default=None, help="Blocks of the image predictor (2).")

    def __post_init__(self) -> None:
        if self.mode == "full":
            raise UserError(
                "--mode full: nothing would be dropped, so there is nothing to train; use image or image_text"
            )
        check_finite(self)
        SparsityConfig.from_dict(self.sparsity())

    def sparsity(self) -> dict[str, Any]:
        """Return the given `SparsityConfig` fields."""
        known = {item.name for item in fields(SparsityConfig)}
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name in known}
        if self.prompt_keep_rate < 1:
            given["prompt_predictor"] = True
        low, colon, high = str(self.vision_keep_rate).partition(":")
        try:
            given["vision_keep_rate"] = float(low)
            if colon:
                given["vision_keep_range"] = float(low), float(high)
                given["vision_keep_rate"] = math.sqrt(float(low) * float(high))  # unless told otherwise later
        except ValueError:
            raise UserError(
                f"--vision_keep_rate {self.vision_keep_rate}: must be a share or LOW:HIGH"
            ) from None
        if self.gates is not None:
            if colon:
                raise UserError(
                    "--gates: its first rate stands for --vision_keep_rate; give that as one share"
                )
            (given["sparse_layer"], given["vision_keep_rate"]), *later = self._gates(self.gates)
            given["later_gates"] = tuple(later)
        return {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def _gates(text: str) -> list[tuple[int, float]]:
        """(layer, rate) of each gate in `LAYER:RATE,LAYER:RATE`."""
        try:
            pairs = [part.split(":") for part in text.split(",")]
            return [(int(layer), float(rate)) for layer, rate in pairs]
        except ValueError:
            raise UserError(f"--gates {text}: must be LAYER:RATE,LAYER:RATE, such as 2:0.5,4:0.2") from None


@dataclass
class DataArguments:
    """What to train on."""

    data_path: str = HfArg(help="A mixture in LLaVA's JSON format.")
    image_folder: str = HfArg(help="The folder that the samples' image paths start from.")
    model_max_length: int = HfArg(
        default=2048,
        help="Longer samples lose the text behind it; where that would cut an image or every answer they are "
        "skipped and reported (tokens, image tokens included).",
    )
    text_only: bool = HfArg(
        default=False, help="Also train on conversations without an image; the paper's recipe doesn't."
    )
    held_out: int = HfArg(default=0, help="Samples kept from training and evaluated every --eval_steps.")
    skip_bad: float = HfArg(
        default=0.001,
        help="Samples that are malformed or whose image is missing or can't be decoded: so many, or below 1 such a"
        " share, are skipped and named in skipped.jsonl; more end the run, before it starts where they are "
        "known by then.",
    )
    allow_outside: bool = HfArg(
        default=False, help="Image paths may lead out of --image_folder ('..', absolute, links)."
    )
    strict: bool = HfArg(
        default=False, help="A sample too long for --model_max_length is an error, not skipped."
    )
    data_cache: str | None = HfArg(
        default=None, help="Where the checked data is kept as Arrow (default: ~/.cache/dynllava, or XDG's)."
    )

    def __post_init__(self) -> None:
        if self.model_max_length < 1:
            raise UserError(f"--model_max_length {self.model_max_length}: must be positive")
        check_finite(self)
        if self.held_out < 0:
            raise UserError(f"--held_out {self.held_out}: must not be negative")
        if self.skip_bad < 0 or (self.skip_bad > 1 and self.skip_bad % 1):
            raise UserError(f"--skip_bad {self.skip_bad}: must be a number of samples, or below 1 a share")


@dataclass
class AdapterArguments:
    """What of the LLM trains: all, LoRA (in a quantised LLM: QLoRA) or nothing; the predictors train in full either way."""

    train: str = HfArg(
        default="llm",
        help="'llm': the LLM and the predictors; 'predictors': those, and LoRA with --lora_rank.",
    )
    lora_rank: int = HfArg(default=0, help="Rank of LoRA's matrices; 0 trains the whole LLM.")
    lora_alpha: float | None = HfArg(
        default=None, help="LoRA's scale is lora_alpha / lora_rank (default: twice the rank)."
    )
    lora_dropout: float = HfArg(default=0.05, help="Dropout before LoRA's matrices.")
    lora_targets: list[str] = HfArg(
        default_factory=lambda: list(LORA_TARGETS), help="Linear layers of the decoder that get an adapter."
    )
    quantize: str = HfArg(
        default="none", help="'4bit' (NF4, QLoRA) or '8bit': the frozen LLM under LoRA, by bitsandbytes."
    )

    def __post_init__(self) -> None:
        check_finite(self)
        if self.lora_rank < 0:
            raise UserError(f"--lora_rank {self.lora_rank}: must not be negative")
        if self.lora_rank and not find_spec("peft"):
            raise UserError('--lora_rank needs peft: pip install -e ".[train]"')
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: must be in [0, 1)")
        unknown = sorted(set(self.lora_targets) - set(LORA_TARGETS))
        if unknown or not self.lora_targets:
            named = unknown[0] if unknown else "none"
            raise UserError(f"--lora_targets {named}: choose from {' '.join(LORA_TARGETS)}")
        if self.quantize not in ("none", "4bit", "8bit"):
            raise UserError(f"--quantize {self.quantize}: must be none, 4bit or 8bit")
        if self.quantize != "none" and not self.lora_rank:
            raise UserError(f"--quantize {self.quantize}: quantised weights can't train; add --lora_rank")
        if self.train not in ("llm", "predictors"):
            raise UserError(f"--train {self.train}: must be llm or predictors")

    @property
    def quantization(self) -> str | None:
        """Return `quantize` as `load_model` takes it."""
        return None if self.quantize == "none" else self.quantize

    @property
    def frozen(self) -> bool:
        """Return whether the LLM's own weights stay as they are."""
        return bool(self.lora_rank) or self.train == "predictors"


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the recipe's defaults and its three additions."""

    output_dir: str = HfArg(help="Where the trained model and its logs go.")  # type: ignore[assignment]
    learning_rate: float = HfArg(default=5e-6, help="Peak learning rate of the LLM.")
    predictor_learning_rate: float = HfArg(default=2e-4, help="Peak learning rate of the predictors.")
    global_batch_size: int = HfArg(
        default=64, help="Samples per optimiser step over all processes; sets the gradient accumulation."
    )
    loss_average: str = HfArg(
        default="labels",
        help="The cross entropy of a step: 'labels' is the mean over all its labelled tokens; 'batches' the mean "
        "over forward passes of each one's mean, as the published code has it.",
    )
    train_projector: bool = HfArg(
        default=False,
        help="Train the projector (merger) too, at the LLM's rate, as the published script does.",
    )
    max_grad_norm: float = HfArg(
        default=0.0,
        help="Clip the gradients of the LLM and those of the predictors to this norm, each by itself; 0: not at all.",
    )
    tau_start: float = HfArg(default=1.0, help="Gumbel-softmax temperature at the start.")
    tau_end: float = HfArg(default=0.1, help="Gumbel-softmax temperature at the end (exponential).")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Replace a model, or another run's checkpoints, that --output_dir already holds."
    )

    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    lr_scheduler_type: str = HfArg(default="cosine", help="Schedule of both learning rates.")
    warmup_steps: float = HfArg(default=0.03, help="Linear warmup: steps, or below 1 a share of all.")
    weight_decay: float = HfArg(default=0.0, help="Weight decay.")
    per_device_train_batch_size: int = HfArg(default=8, help="Samples per forward pass and device.")
    gradient_accumulation_steps: int | None = HfArg(  # type: ignore[assignment]
        default=None, help="Follows from --global_batch_size; refused where it contradicts it."
    )
    logging_steps: float = HfArg(default=10, help="Log every so many optimiser steps.")
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="A loss that is not finite ends the run instead."
    )
    save_strategy: str = HfArg(
        default="steps", help="'steps' or 'epoch' saves checkpoint-N to go on from; 'no' doesn't."
    )
    save_steps: float = HfArg(default=500, help="Steps between checkpoints, or below 1 a share of all steps.")
    save_total_limit: int | None = HfArg(
        default=2, help="Checkpoints to keep; the one before the last is there for a damaged last."
    )
    eval_steps: float | None = HfArg(default=500, help="Steps between evaluations of --held_out samples.")
    dataloader_num_workers: int = HfArg(default=1, help="Processes that decode images, per device.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the data is ours.")
    report_to: str | None = HfArg(  # type: ignore[assignment]
        default="tensorboard" if find_spec("tensorboard") else "none",
        help="'tensorboard' (default where installed), 'wandb', 'none', ...",
    )

    def __post_init__(self) -> None:
        self.gradient_accumulation_steps = self._accumulation()
        check_finite(self)
        if self.loss_average not in LOSS_AVERAGES:
            raise UserError(f"--loss_average {self.loss_average}: must be {' or '.join(LOSS_AVERAGES)}")
        if self.per_device_eval_batch_size < 1:
            raise UserError(
                f"--per_device_eval_batch_size {self.per_device_eval_batch_size}: must be positive"
            )
        for name in ("max_grad_norm", "weight_decay", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        for name in ("learning_rate", "predictor_learning_rate", "tau_start", "tau_end"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be positive")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: must be positive")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(f"--save_total_limit {self.save_total_limit}: must be positive")
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise UserError(f"--{name} {getattr(self, name)}: must be between 0 and 2^32 - 1")
        for name in ("save_steps", "eval_steps", "logging_steps"):
            steps = getattr(self, name)
            if steps is not None and not (0 < steps < 1 or (steps >= 1 and steps % 1 == 0)):
                raise UserError(f"--{name} {steps}: must be a number of steps, or below 1 a share of all")
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise UserError(f"--{name} {str(getattr(self, name)).lower()}: {reason}; leave it out")
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise UserError(
                f"--lr_scheduler_type {self.lr_scheduler_type}: follows a loss that nothing measures"
            )
        if self.save_strategy == "best":
            raise UserError("--save_strategy best: checkpoints stay by age; choose steps, epoch or no")
        known = ["none", "all", *get_available_reporting_integrations()]
        for report in self.report_to if isinstance(self.report_to, list) else [self.report_to]:
            if report not in known:
                raise UserError(f"--report_to {report}: not installed here; choose from {' '.join(known)}")
        super().__post_init__()
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs but one process: start with `accelerate launch`, or set "
                "CUDA_VISIBLE_DEVICES to one of them"
            )
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and PyTorch would say so

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
