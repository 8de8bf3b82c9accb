"""What a run is: the arguments that decide its weights, kept beside its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import saved_json, write_json
from train import checkpoints
from train.arguments import AdapterArguments, DataArguments, ModelArguments, RecipeArguments
from train.writing import naming_the_file

RECORD = "run.json"
DATA = ("model_max_length", "text_only", "held_out")
# Not how a step is spread over processes, what is logged, nor where files go: those may change in mid-run.
RECIPE = (
    *("seed", "data_seed", "learning_rate", "predictor_learning_rate", "global_batch_size", "tau_start"),
    *("tau_end", "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args"),
    *("bf16", "fp16", "train_sampling_strategy", "neftune_noise_alpha", "loss_average", "train_projector"),
)
# What a checkpoint has weights and moments of.
SHAPE = (
    *("mode", "gates", "vision_keep_range", "prompt_predictor", "train", "lora_rank", "lora_targets"),
    *("train_projector", "predictor_dim", "predictor_heads", "predictor_ffn_dim", "predictor_layers"),
)


def describe(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RecipeArguments,
    adapter_args: AdapterArguments,
    data: str,
) -> dict[str, Any]:
    """Return the arguments that decide a run's weights, JSON-ready."""
    values = {
        **vars(model_args),
        **model_args.sparsity(),
        **{name: getattr(data_args, name) for name in DATA},
        **{name: getattr(args, name, None) for name in RECIPE},
        **vars(adapter_args),
        # What a mean over forward passes is of.
        "per_device_train_batch_size": (
            args.per_device_train_batch_size if args.loss_average == "batches" else None
        ),
        "data_path": data,  # what is in it: the file may move
    }
    return json.loads(json.dumps(values, default=str, sort_keys=True))


class RunRecord:
    """`run.json` of an output folder.

    Parameters
    ----------
    output_dir : Path
    values : dict
        What the run that is starting is (see `describe`).
    sharding : str
        How it shards its weights (see `train.sharding.sharding`): its checkpoints can be read under that only.
    """

    def __init__(self, output_dir: Path, values: dict[str, Any], sharding: str) -> None:
        self.output_dir, self.values, self.sharding = output_dir, values, sharding
        self.found = saved_json(output_dir / RECORD)

    def difference(self) -> str | None:
        """Return the first argument that the folder's run had otherwise, in words; None where it is this run."""
        if not self.found:
            return "another run"
        before = self.found.get("arguments", {})
        for name, value in self.values.items():
            if before.get(name) != value:
                if name == "data_path":
                    digest, *_ = str(value).split()
                    if str(before.get(name)).startswith(digest):
                        return "a run that left out other bad samples of this data (images came or went)"
                    return "a run on other data (--data_path)"
                return f"a run with --{name} {before.get(name)}, not {value}"
        return None

    @property
    def finished(self) -> bool:
        """Whether the folder holds the model of this very run."""
        done = (self.output_dir / "config.json").exists() or (
            self.output_dir / "adapter_config.json"
        ).exists()
        return bool(self.found.get("finished") and done and self.difference() is None)

    def write(self, finished: bool) -> None:
        """Say what the folder holds from now on."""
        record = {"finished": finished, "sharding": self.sharding, "arguments": self.values}
        with naming_the_file(self.output_dir / RECORD):
            write_json(self.output_dir / RECORD, record)

    def misfit(self, checkpoint: Path) -> str | None:
        """Why a whole checkpoint, of this run or another, can't be read as this one is started; None where it can."""
        record = saved_json(checkpoint.parent / RECORD)
        before, sharding = record.get("arguments", {}), record.get("sharding", self.sharding)
        if sharding != self.sharding:
            return f"was saved under {sharding} and can't be read under {self.sharding}"
        for name in SHAPE if before else ():
            if before.get(name) != self.values.get(name):
                return f"is of a run with {name} {before.get(name)}, not {self.values.get(name)}"
        return None

    def named(self, name: str | None) -> Path | None:
        """Return the checkpoint of `--resume_from_checkpoint`; None where this run has a newer one of its own.

        Raises
        ------
        UserError
            It is not whole, or doesn't fit how this run is started.
        """
        if not name:
            return None
        checkpoint = Path(name)
        problem = checkpoints.damage(checkpoint)
        if self.difference() is None and not self.finished:
            own, _ = checkpoints.last_whole(self.output_dir)
            if own and (problem or checkpoints.step_of(own) >= checkpoints.saved_step(checkpoint)):
                return None
        if problem:
            raise UserError(f"--resume_from_checkpoint {name}: not a whole checkpoint ({problem})")
        if misfit := self.misfit(checkpoint):
            raise UserError(f"--resume_from_checkpoint {name} {misfit}; start as that run was")
        return checkpoint

    def start(self, overwrite: bool, spare: Path | None = None) -> tuple[Path | None, list[str]]:
        """Clear the folder of other runs and return where this one goes on: its newest whole checkpoint (None: from the beginning).

        Parameters
        ----------
        overwrite : bool
            Another run's checkpoints may be deleted.
        spare : Path, optional
            A checkpoint that is not deleted in any case.

        Returns
        -------
        checkpoint : Path or None
        notes : list of str
            Lines about checkpoints that were passed over.

        Raises
        ------
        UserError
            The folder holds checkpoints of another run, or of this one under another launcher.
        """
        there = checkpoints.checkpoints(self.output_dir)
        other = self.difference()
        if other is None and self.finished:  # and to be replaced, or `start` would not be called
            other = "the same run, finished"
        if there and other and not overwrite:
            raise UserError(
                f"--output_dir {self.output_dir} holds {there[-1].name} of {other}: give that run's flags to go "
                "on, another folder, or --overwrite_output_dir true to start anew"
            )
        if there and not other and (other := self.misfit(there[-1])) and not overwrite:
            raise UserError(
                f"{there[-1]} {other}: start as before to go on, or --overwrite_output_dir true to start anew"
            )
        checkpoints.clean_up(self.output_dir)
        if other:
            for path in there:
                if spare is None or not path.samefile(spare):
                    checkpoints.discard(path)
        self.write(finished=False)
        return (None, []) if other else checkpoints.last_whole(self.output_dir)
