"""Finetune a VLM with predictors, a LLaVA-1.5 into a Dynamic-LLaVA: `accelerate launch train/finetune.py --help`."""

from __future__ import annotations

import logging
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: find `train` and `dynllava_plugin` from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if "bitsandbytes" not in sys.modules:
    # transformers' Trainer imports peft, peft imports it, and it says that its kernel for 4 bits on a CPU isn't there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import dynllava_plugin.interrupts  # noqa: F401  before all that takes time

# isort: split
import numpy as np
import torch
from transformers import IntervalStrategy, set_seed
from transformers.utils import strtobool

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import check_folder
from dynllava_plugin.model.checkpoints import check_settings, load_to_train
from train import checkpoints
from train.adapters import add_adapter, bases, trained_predictors
from train.agreement import from_the_first, gather, together
from train.arguments import AdapterArguments, DataArguments, ModelArguments, RecipeArguments
from train.checkpoints import saying_what_is_left
from train.command_line import parse
from train.conversation import ConversationEncoder
from train.data import Collator, ConversationDataset, encoder_of
from train.held_out import HeldOut, usable
from train.images import missing_images
from train.interruption import Interruption
from train.measures import off_target
from train.mixture import Mixture, open_mixture
from train.outputs import (
    EVALUATION,
    PARTIAL_MODEL,
    TRAINING,
    CsvLog,
    held,
    make_savable,
    prepare_output_dir,
    save_model,
)
from train.run_record import RunRecord, describe
from train.sharding import FSDP, sharding, whole_weights
from train.skipped import MALFORMED, MISSING, Entry, SkippedSamples, most_frequent
from train.trainer import DynamicLlavaTrainer, freeze


def main(argv: list[str] | None = None) -> int:
    """Run the command and return 0, 2 after a one-line error, 143 where SIGTERM stopped it (saved; the same command goes on)."""
    try:
        return train(*parse(argv))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process has the same: found by all, or passed on
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:  # this process's own disk
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RecipeArguments,
    adapter_args: AdapterArguments,
) -> int:
    """Check everything that can be checked, train, save.

    Raises
    ------
    UserError
        Something a user can fix.
    """
    if data_args.held_out and args.eval_strategy == "no":
        args.eval_strategy = IntervalStrategy.STEPS
    if args.eval_strategy != "no" and not data_args.held_out:
        raise UserError(f"--eval_strategy {args.eval_strategy}: nothing to evaluate; add --held_out N")
    if args.train_projector and adapter_args.frozen:
        raise UserError(
            "--train_projector: a run with --lora_rank or --train predictors leaves it frozen; leave one out"
        )
    sharded = sharding(args)
    if data_args.held_out and adapter_args.lora_rank and sharded == FSDP:
        raise UserError(
            "--held_out under FSDP needs a run without an adapter; use DDP, or no held-out samples"
        )
    check_first(model_args, data_args, args, adapter_args)
    data = read_data(data_args, args)
    output_dir = Path(args.output_dir)
    values = describe(model_args, data_args, args, adapter_args, data.identity)
    record = together(lambda: RunRecord(output_dir, values, sharded))  # read by all before any writes
    if record.finished and not args.overwrite_output_dir:
        say(args, f"{output_dir} holds the finished model of this very run; nothing to do")
        return 0
    # A model of this run that isn't finished was moved into place right before the run was killed.
    replaces = args.overwrite_output_dir or record.difference() is None
    together(lambda: prepare_output_dir(args.output_dir, replaces, bases(model_args.model_name_or_path)))
    with held(output_dir, args.process_index == 0):
        return fit(model_args, data_args, args, adapter_args, data, record)


def check_first(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RecipeArguments,
    adapter_args: AdapterArguments,
) -> None:
    """Raise `UserError` for a model, place or checkpoint that the run would fail at later; nothing is written before."""

    def look() -> None:
        check_settings(model_args.model_name_or_path)  # what its own config says, too
        check_settings(
            model_args.model_name_or_path, quantization=adapter_args.quantization, **model_args.sparsity()
        )
        check_folder("--output_dir", Path(args.output_dir))
        if not Path(data_args.image_folder).is_dir():
            raise UserError(f"--image_folder {data_args.image_folder}: no such folder")
        name = args.resume_from_checkpoint
        if name and not checkpoints.checkpoints(Path(args.output_dir)):
            if problem := checkpoints.damage(Path(name), read=False):
                raise UserError(f"--resume_from_checkpoint {name}: not a whole checkpoint ({problem})")

    together(look)


def fit(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RecipeArguments,
    adapter_args: AdapterArguments,
    data: Data,
    record: RunRecord,
) -> int:
    """Train from the run's last whole checkpoint or from the beginning, in an output folder that is this run's; save."""
    output_dir = record.output_dir
    named = from_the_first(lambda: record.named(args.resume_from_checkpoint))
    checkpoint, notes = from_the_first(lambda: record.start(args.overwrite_output_dir, spare=named))
    if named:
        checkpoint, notes = named, []
    for note in notes:
        say(args, note)
    skipped = SkippedSamples(output_dir / "skipped.jsonl", data.allowed)
    if args.process_index == 0:
        if checkpoint is None:
            skipped.path.unlink(missing_ok=True)
        skipped.add(*data.bad)
    model, processor, dtype = build_model(model_args, args, adapter_args)
    dataset = ConversationDataset(
        data.training,
        data_args.image_folder,
        encoder_of(model, processor),
        data_args.model_max_length,
        data_args.strict,
        skipped,
    )
    evaluation = None
    if data.held_out is not None:
        held_out = usable(dataset.over(data.held_out))
        evaluation = HeldOut(dataset.over(held_out), args.per_device_eval_batch_size)
    tables = (TRAINING,) if evaluation is None else (TRAINING, EVALUATION)
    with Interruption() as interruption:
        trainer = DynamicLlavaTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(processor.tokenizer.pad_token_id, dataset.encode.stand_in()),
            processing_class=processor,
            callbacks=[CsvLog(output_dir, tables)],
            interruption=interruption,
            eval_dataset=data.held_out,  # Trainer wants one; what is measured is `evaluation`'s
            evaluation=evaluation,
        )
        bad = f", {len(data.bad)} bad ones skipped, see {skipped.path}" if data.bad else ""
        say(
            args,
            f"{len(data.training)} samples ({data.left_out} text-only left out{bad}), global batch {args.global_batch_size} = "
            f"{args.per_device_train_batch_size} x {args.world_size} processes x "
            f"{args.gradient_accumulation_steps} accumulated, on {args.device}",
        )
        if checkpoint is not None:
            say(args, f"going on from {checkpoint}")
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (UserError, OSError) as error:
            # This process's own samples or disk, so each says it; on a line of its own behind the progress bar.
            print(f"\nerror: {one_line(error)}", file=sys.stderr, flush=True)
            return 2
        if trainer.stopping and skipped.too_many():
            say(args, f"\nstopped after step {trainer.state.global_step}, which is saved")
            raise skipped.refusal()
        if trainer.stopping:
            say(args, f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on")
            return Interruption.EXIT_CODE
        with saying_what_is_left(
            "the model", output_dir, output_dir / PARTIAL_MODEL, trainer.args.should_save
        ):
            save_model(trainer, output_dir, dtype)
    if trainer.is_world_process_zero():
        record.write(finished=True)
        counts = skipped.counts()
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        note = f"; skipped samples: {sum(counts.values())} ({words}), see {skipped.path}" if counts else ""
        say(args, f"saved {output_dir}{note}")
        if line := off_target(trainer.state.log_history, trainer.dynamic.config.sparsity):
            say(args, line)
    return 0


def build_model(
    model_args: ModelArguments, args: RecipeArguments, adapter_args: AdapterArguments
) -> tuple[Any, Any, torch.dtype]:
    """Return the model with what is trained in it, its processor, and the dtype to save it in.

    Trained weights are float32, and autocast computes in bfloat16 under `--bf16`; DeepSpeed keeps its own float32
    copy of bfloat16 weights, and a frozen LLM needs no float32.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    deepspeed = args.deepspeed is not None or strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))
    lean = deepspeed or adapter_args.lora_rank
    lean = lean or (adapter_args.frozen and sharding(args) != FSDP)  # which takes weights of one dtype
    set_seed(args.seed)  # fresh predictors
    with whole_weights():
        model, processor = load_to_train(
            model_args.model_name_or_path,
            # Quantised weights stay where they are made.
            device=args.device if adapter_args.quantization else "cpu",
            dtype=dtype if lean else torch.float32,
            quantization=adapter_args.quantization,
            **model_args.sparsity(),
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.sum(dtype=torch.float32)):
            raise UserError(
                f"--model_name_or_path {model_args.model_name_or_path}: {name} has values that are not finite"
            )
    make_savable(model)
    settings, llm = model.config.sparsity, model.model.language_model
    if model.fresh_predictors:
        say(args, f"{model_args.model_name_or_path} has no predictors: they start fresh")
        # Else an untrained one would be saved beside them, as if it were trained.
        if settings.mode == "image":
            llm.text_predictor, settings.text_predictor = None, False
    if settings.drops_prompt:
        settings.question_marks = question_marks(encoder_of(model, processor))
    if not adapter_args.lora_rank:
        freeze(model, args.train_projector, adapter_args.train == "llm")
        if adapter_args.frozen and not deepspeed:
            for name in trained_predictors(model):
                getattr(llm, name).float()
        return model, processor, dtype
    adapted = add_adapter(model, adapter_args)
    name = model_args.model_name_or_path
    base = str(Path(name).resolve()) if Path(name).is_dir() else name
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted, processor, dtype


@dataclass(frozen=True)
class Data:
    """What a run trains on, what it keeps for evaluation, and what it leaves out: text-only samples, and bad ones by name.

    `allowed` is how many bad samples there may be in all; `identity` changes with the file and with those left out.
    """

    training: Mixture
    held_out: Mixture | None
    left_out: int
    bad: list[Entry]
    allowed: int
    identity: str


def question_marks(encode: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of vicuna_v1's "USER:" and "ASSISTANT:", or raise `UserError` for another template."""
    if not isinstance(encode, ConversationEncoder):
        raise UserError(
            "--prompt_keep_rate: the question is found by LLaVA-1.5's USER: and ASSISTANT:; leave it out"
        )
    texts = ("x</s>", "x</s>USER:", "x", "x ASSISTANT:")  # as they stand behind something
    ids = [encode.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return tuple(ids[1][len(ids[0]) :]), tuple(ids[3][len(ids[2]) :])


def read_data(data_args: DataArguments, args: RecipeArguments) -> Data:
    """Return the run's data, without its bad samples; the same on every process.

    Read by one process of a node, mapped by the others; the images' folders are listed by each node's first.

    Raises
    ------
    UserError
        More bad samples than `--skip_bad` allows (the line has the most frequent reasons), a path that leaves the image
        folder, or a file that is no mixture.
    """

    def opened() -> tuple[Mixture, int]:
        with args.main_process_first(local=True, desc="reading the data"):
            return open_mixture(data_args.data_path, data_args.data_cache, data_args.text_only)

    def look() -> dict[str, str]:
        if args.local_process_index:
            return {}
        return missing_images(mixture, data_args.image_folder, data_args.allow_outside)

    mixture, left_out = together(opened)
    missing = {image: why for of_node in gather(together(look)) for image, why in of_node.items()}
    bad: list[Entry] = [(row, MALFORMED, problem) for row, problem in mixture.problems().items()]
    for index, image in mixture.users(missing) if missing else ():
        bad.append((int(mixture.rows[index]), MISSING, f"{mixture.name(index)}: {missing[image]}"))
    skip = data_args.skip_bad
    allowed = int(skip if skip >= 1 else skip * len(mixture))
    if len(bad) > allowed:
        raise UserError(
            f"--data_path {data_args.data_path}: {len(bad)} of {len(mixture)} samples can't be trained on, "
            f"--skip_bad {skip:g} allows {allowed}: {most_frequent([reason for _, _, reason in bad])}"
        )
    good = mixture.without([row for row, _, _ in bad])
    if not len(good):
        raise UserError(f"--data_path {data_args.data_path}: none of its samples is left to train on")
    training, held_out = split(good, data_args.held_out, args.seed)
    rows = sorted({row for row, _, _ in bad})  # not why: a reason names the file, which may move
    left = f" without {zlib.crc32(repr(rows).encode()):08x}" if bad else ""
    return Data(training, held_out, left_out, bad, allowed, f"{mixture.digest}{left}")


def split(mixture: Mixture, held_out: int, seed: int) -> tuple[Mixture, Mixture | None]:
    """Return the mixture without `held_out` of its samples, and those, drawn by the run's seed."""
    if not held_out:
        return mixture, None
    if held_out >= len(mixture):
        raise UserError(f"--held_out {held_out}: the data has {len(mixture)} samples, so none would be left")
    order = np.random.default_rng([seed, 0]).permutation(len(mixture))
    return mixture.take(np.sort(order[held_out:])), mixture.take(np.sort(order[:held_out]))


def say(args: RecipeArguments, line: str) -> None:
    """Print a line, once."""
    if args.process_index == 0:
        print(line, flush=True)


def one_line(error: Exception) -> str:
    """Return the error's message; from a data-loading process it arrives with a traceback before it."""
    line = str(error).strip().splitlines()[-1]
    return (
        line.split("Error: ", 1)[1]
        if line.startswith(("dynllava_plugin.", "train.")) and "Error: " in line
        else line
    )


if __name__ == "__main__":
    sys.exit(main())
