"""Train the bundled tiny LLaVA from scratch: vision tower, then projector and language model.

    python train/tiny_llava/train.py --output_dir DIR
    python train/tiny_llava/train.py --scenes hard --output_dir DIR       # for hard scenes, from the bundled one on

writes a checkpoint that plain transformers load (`AutoModelForImageTextToText`, `AutoProcessor`), every
`--checkpoint_every` steps and at the end. See `train/tiny_llava/README.md` for times and accuracies.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

if (
    __name__ == "__main__"
):  # run as a file: find `train`, `dynllava_plugin` and not the modules beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    # glibc gives large buffers back to the kernel at every step, and paging them in again costs time.
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        big = str(1 << 34)
        os.environ |= {
            "MALLOC_MMAP_THRESHOLD_": big,
            "MALLOC_TRIM_THRESHOLD_": big,
            "MALLOC_TOP_PAD_": str(1 << 28),
        }
        os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]])

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor

from dynllava_plugin.easy_vqa.facts import load_tiles
from dynllava_plugin.easy_vqa.writing import write_test
from train.tiny_llava.evaluate import accuracy
from train.tiny_llava.language import align_projector, train_language
from train.tiny_llava.recipes import RECIPES, Recipe
from train.tiny_llava.tokenizer import build_processor
from train.tiny_llava.vision import TileSet, train_vision, vision_config


def save_checkpoint(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the checkpoint whole or not at all: half precision in the file, float32 when loaded.

    `config.json` says float32, so `from_pretrained` widens the weights again: on CPUs float16 is slow.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    model.save_pretrained(
        temporary, state_dict={key: value.half() for key, value in model.state_dict().items()}
    )
    processor.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    temporary.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def vision_stage(args: argparse.Namespace, recipe: Recipe, train: TileSet, test: TileSet) -> CLIPVisionModel:
    """Train the tower, or take it from `--vision_weights` where that file exists already."""
    if args.vision_weights is not None and args.vision_weights.exists():
        tower = CLIPVisionModel(vision_config(image_size=recipe.side))
        tower.load_state_dict(load_file(args.vision_weights))
        return tower.eval()
    tower = train_vision(
        recipe.tower().to(args.device),
        recipe.vision(train, args.seed),
        lambda: recipe.unseen(test),
        args.vision_steps or recipe.steps[0],
        place_weight=recipe.place_weight,
    )
    if args.vision_weights is not None:
        args.vision_weights.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.vision_weights.with_suffix(".tmp")
        save_file(tower.state_dict(), temporary)
        os.replace(temporary, args.vision_weights)
    return tower


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder of the checkpoint, new or empty"
    )
    parser.add_argument(
        "--vision_weights", type=Path, help="safetensors file to keep stage 1 in, or to take it from"
    )
    parser.add_argument("--scenes", choices=sorted(RECIPES), default="easy", help="what it is trained on")
    parser.add_argument("--vision_steps", type=int, help="stage 1: batches of 36 images (1500; hard: 1000)")
    parser.add_argument(
        "--steps",
        type=int,
        help="stage 2: batches of 7 scenes and 3 single images (2000; hard: 8 scenes, 1600)",
    )
    parser.add_argument("--layers", type=int, default=6, help="of the language model")
    parser.add_argument("--width", type=int, default=192, help="of the language model, a multiple of 32")
    parser.add_argument("--checkpoint_every", type=int, default=200, help="steps of stage 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    for flag in ("vision_steps", "steps", "layers", "width", "checkpoint_every"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(args, flag)}: give 1 or more")
    if args.width % 32:
        raise ValueError(f"--width is {args.width}: give a multiple of 32")
    if args.output_dir.exists() and not (args.output_dir.is_dir() and not any(args.output_dir.iterdir())):
        raise ValueError(
            f"--output_dir {args.output_dir} is not empty, and would be replaced: name a new folder"
        )
    return args


def test_rows(folder: Path, benchmark: str) -> list[dict[str, str]]:
    """The rows of a test set."""
    return [json.loads(line) for line in (folder / f"{benchmark}_test.jsonl").read_text().splitlines()]


def main(arguments: list[str] | None = None) -> int:
    """Both stages, then the accuracies of the checkpoint as saved; returns the exit status."""
    try:
        args = parse_arguments(arguments)
        torch.manual_seed(args.seed)
        recipe = RECIPES[args.scenes]
        tiles = load_tiles("train")
        train, test = TileSet(tiles), TileSet(load_tiles("test"))
        tower = vision_stage(args, recipe, train, test)
        tokenizer = recipe.tokenizer(tiles)
        processor = build_processor(tokenizer, recipe.side)
        model = recipe.model(tower.cpu(), tokenizer, args.layers, args.width).to(args.device)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        align_projector(
            model, recipe.alignment(train, args.seed), tokenizer, recipe.steps[1], halves=recipe.halves
        )
        train_language(
            model, recipe.language(train, tokenizer, args.seed), args.steps or recipe.steps[2],
            checkpoint=lambda model, step: save_checkpoint(model, processor, args.output_dir),
            checkpoint_every=args.checkpoint_every,
        )  # fmt: skip
        model = LlavaForConditionalGeneration.from_pretrained(args.output_dir).eval()
        with tempfile.TemporaryDirectory() as folder:
            write_test(Path(folder), scenes=1000, questions=4, described=200, seed=0)
            for benchmark in recipe.benchmarks:
                rows = test_rows(Path(folder), benchmark)
                found = accuracy(model, tokenizer, rows, folder)
                print(f"{benchmark}: {found['all']:.2%} of {len(rows)} answers right")
    except (OSError, ValueError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
