"""`dynllava show IMAGE QUESTION`: answers, with a picture and a page of what each policy kept."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.options import add_flags
from dynllava_plugin.evaluation.settings import ModelSettings, settings_named
from dynllava_plugin.files import check_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image file")
    add("question", metavar="QUESTION")
    add("--pretrained", default="tiny", help="checkpoint folder, hub id, or tiny (default: %(default)s)")
    add("--policy", nargs="+", default=[None], metavar="POLICY",
        help="one or several, side by side, e.g. image_text fastv,k=2 (default: the checkpoint's)")  # fmt: skip
    add("--max-new-tokens", "--max_new_tokens", type=int, default=256,
        help="of the answer (default: %(default)s)")  # fmt: skip
    add("--output", type=Path,
        help="the picture's file (default: IMAGE's name + _kept.png, here); the page lies beside it as .html")  # fmt: skip
    add_flags(parser, settings_named("vision_keep_rate", "device", "dtype"))


def run(args: argparse.Namespace) -> int:
    """Answer under each policy, draw, and say where the files are."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {args.max_new_tokens} is not positive")
    output = args.output or Path(f"{Path(args.image).stem}_kept.png")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output: {output} must end in .png")

    check_file("--output", output)

    from dynllava_plugin import explain
    from dynllava_plugin.files import write_bytes, write_text
    from dynllava_plugin.images import open_image
    from dynllava_plugin.model.checkpoints import load_to_train
    from dynllava_plugin.policies.registry import policy_changes
    from dynllava_plugin.visualize.page import page
    from dynllava_plugin.visualize.picture import UNTRAINED, draw

    image = open_image(args.image)  # before the checkpoint: a wrong path costs no time
    settings = [
        ModelSettings(args.pretrained, vision_keep_rate=args.vision_keep_rate, policy=policy)
        for policy in args.policy
    ]
    # Whose predictors are untrained is said of each policy, not of the checkpoint's own.
    model, processor = load_to_train(args.pretrained, device=args.device, dtype=args.dtype)
    base, explanations = model.config.sparsity, []
    for setting in settings:
        model.config.text_config.sparsity = base
        model.set_sparsity(**policy_changes(setting.sparsity()))
        explanations.append(
            explain(model, processor, image, args.question, args.max_new_tokens, setting.policy)
        )
        print(f"{explanations[-1].policy}: {explanations[-1].answer}", flush=True)
        if explanations[-1].untrained:
            print(f"{explanations[-1].policy}: {UNTRAINED}", file=sys.stderr)
    picture = io.BytesIO()
    draw(explanations).save(picture, format="PNG")
    write_bytes(output, picture.getvalue())
    write_text(output.with_suffix(".html"), page(explanations))
    print(f"picture: {output}\npage: {output.with_suffix('.html')}")
    return 0
