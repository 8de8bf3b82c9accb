"""Finetune a LLaVA-1.5 into a Dynamic-LLaVA: `accelerate launch train/finetune.py --help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: find `train` and `dynllava_plugin` from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import set_seed

from dynllava_plugin import load_model
from dynllava_plugin.errors import UserError
from train.arguments import DataArguments, ModelArguments, RecipeArguments, parse
from train.data import Collator, ConversationDataset, count_skipped
from train.outputs import CsvLog, make_savable, prepare_output_dir, save_model
from train.samples import check_images, read_samples
from train.trainer import DynamicLlavaTrainer, freeze


def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 after a one-line error."""
    try:
        train(*parse(argv))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def train(model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments) -> None:
    """Check everything that can be checked, train, save.

    Raises
    ------
    UserError
        Something a user can fix.
    """
    samples, text_only = read_samples(data_args.data_path)
    check_images(samples, data_args.image_folder)
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    set_seed(args.seed)  # fresh predictors
    model, processor = load_model(
        model_args.model_name_or_path, device="cpu", dtype=torch.float32, **model_args.sparsity()
    )
    freeze(model)
    make_savable(model)
    skipped_file = output_dir / "skipped.jsonl"
    if args.process_index == 0 and not args.resume_from_checkpoint:
        skipped_file.unlink(missing_ok=True)
    dataset = ConversationDataset(
        samples,
        data_args.image_folder,
        processor,
        model.config.image_token_id,
        data_args.model_max_length,
        data_args.skip_unreadable,
        skipped_file,
    )
    trainer = DynamicLlavaTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        callbacks=[CsvLog(output_dir / "train_log.csv", append=bool(args.resume_from_checkpoint))],
    )
    if trainer.is_world_process_zero():
        print(
            f"{len(samples)} samples ({text_only} text-only left out), global batch "
            f"{args.global_batch_size} = {args.per_device_train_batch_size} x {args.world_size} processes x "
            f"{args.gradient_accumulation_steps} accumulated, on {args.device}",
            flush=True,
        )
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except UserError:
        print(file=sys.stderr)  # the error gets a line of its own behind the progress bar
        raise
    save_model(trainer, output_dir, args.bf16)
    trainer.save_state()
    if trainer.is_world_process_zero():
        skipped = count_skipped(skipped_file)
        note = f"; skipped samples: {skipped}, see {skipped_file}" if skipped else ""
        print(f"saved {output_dir}{note}", flush=True)


def one_line(error: Exception) -> str:
    """The error's message; from a data-loading process it arrives with a traceback before it."""
    line = str(error).strip().splitlines()[-1]
    return (
        line.split("Error: ", 1)[1]
        if line.startswith(("dynllava_plugin.", "train.")) and "Error: " in line
        else line
    )


if __name__ == "__main__":
    sys.exit(main())
