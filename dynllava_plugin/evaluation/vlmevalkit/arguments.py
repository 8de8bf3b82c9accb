"""The options of `run_vlmevalkit.py`: ours, and the kit's that we need to know about."""

from __future__ import annotations

import argparse
from pathlib import Path

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.settings import DEFAULT_CHECKPOINT
from dynllava_plugin.evaluation.vlmevalkit.prompts import PROMPTS
from dynllava_plugin.policies import POLICIES
from dynllava_plugin.sparsity.config import IMAGE_POLICIES, MODES

KIT_MODES = ("all", "infer", "eval")


def own_parser() -> argparse.ArgumentParser:
    """Our options; all others go on to the kit."""
    parser = argparse.ArgumentParser(
        prog="run_vlmevalkit.py",
        description="VLMEvalKit with --model dynllava. Options of ours:",
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add(
        "--pretrained",
        default=DEFAULT_CHECKPOINT,
        help="checkpoint folder, hub id, or tiny (default: %(default)s)",
    )
    add(
        "--mode",
        action="append",
        metavar="MODE",
        help=f"{'|'.join(MODES)} for the model; {'|'.join(KIT_MODES)} is the kit's own; once for each",
    )
    add(
        "--vision-keep-rate",
        "--vision_keep_rate",
        type=float,
        help="share of image tokens that stay, in (0, 1]",
    )
    add(
        "--text-keep-rate",
        "--text_keep_rate",
        type=float,
        help="recorded with the run; the decision is learned",
    )
    add(
        "--policy",
        metavar="POLICY[,ARGUMENT=VALUE...]",
        help=f"instead of --mode and --image-policy, e.g. fastv,k=3,r=0.75; one of {', '.join(POLICIES)}",
    )
    add("--image-policy", "--image_policy", choices=IMAGE_POLICIES, help="who chooses the image tokens")
    add(
        "--system-prompt",
        "--system_prompt",
        help="what a chat template begins with instead of its own (not for LLaVA-1.5)",
    )
    for bound, most in (("min", "least"), ("max", "most")):
        add(
            f"--{bound}-pixels",
            f"--{bound}_pixels",
            type=int,
            help=f"an image is resized to at {most} so many (Qwen)",
        )
    add("--random-seed", "--random_seed", type=int, help="of --image-policy random")
    add("--device", help="cpu, cuda, cuda:0, ...")
    add("--dtype", help="float32, bfloat16, float16, auto")
    add("--attn-implementation", "--attn_implementation", help="sdpa, eager, flash_attention_2")
    add("--quantization", choices=("8bit", "4bit"), help="the LLM's weights, through bitsandbytes")
    add(
        "--batch-size",
        "--batch_size",
        type=int,
        default=8,
        help="rows answered at once (default: %(default)s)",
    )
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        default=1024,
        help="of an answer (default: %(default)s)",
    )
    add(
        "--prompts",
        choices=PROMPTS,
        default=PROMPTS[0],
        help="llava: LLaVA-1.5's own wording for VizWiz, POPE, MME and multiple choice; "
        "kit: the kit's (default: %(default)s)",
    )
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the datasets' TSV files, taken as they are: no checksum, no download "
        "(default: $LMUData, checked by the kit)",
    )
    return parser


def kit_parser() -> argparse.ArgumentParser:
    """The kit's options that we need to know about; they all go on to the kit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--config")
    parser.add_argument("--work-dir")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--judge")
    parser.add_argument("--judge-base-url")
    parser.add_argument("--judge-key")
    parser.add_argument("--judge-retry")
    parser.add_argument("--judge-timeout")
    return parser


def split_modes(values: list[str]) -> tuple[str | None, str | None]:
    """`--mode` names two things, how the model runs and which of the kit's stages; their values differ."""
    ours, kits = [v for v in values if v in MODES], [v for v in values if v in KIT_MODES]
    unknown = [value for value in values if value not in (*MODES, *KIT_MODES)]
    if unknown:
        choices = f"choose {', '.join(MODES)} for the model or {', '.join(KIT_MODES)} for the kit"
        raise UserError(f"--mode: unknown value {unknown[0]!r}; {choices}")
    if len(ours) > 1 or len(kits) > 1:
        raise UserError(f"--mode: {' and '.join(values)} contradict each other")
    return (ours[0] if ours else None), (kits[0] if kits else None)
