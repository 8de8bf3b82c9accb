"""Turn the PyPI package `easy-vqa` into LLaVA's training format and four test sets; see `--help`.

Writes, under `--output_dir`: `images/{train,test}/*.png`; `train.json`, multi-turn conversations; and
`easy_vqa_test.jsonl` (the package's own test questions), `easy_vqa_scenes_test.jsonl` (questions about 2x2
scenes), `easy_vqa_describe_test.jsonl` (long answers), `easy_vqa_hard_test.jsonl` (five questions about each of 400
hard scenes); with `--hard_scenes` also `hard_train.json`. Test rows: id, image (relative to the folder), question,
answer; of hard scenes also the question's kind.
Train scenes are tiled from train images only, test scenes from test images only.
"""

import argparse
import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # run as a file: find the packages and, under the name `easy_vqa`, nothing but easy-VQA's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dynllava_plugin.easy_vqa.writing import (
    SEED,
    TEST_DESCRIPTIONS,
    TEST_SCENES,
    write_hard_train,
    write_test,
    write_train,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; out-of-range values end the program with one line."""
    parser = argparse.ArgumentParser(
        description="easy-VQA's images as LLaVA conversations for training and four test sets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=SEED, help="which scenes and questions are drawn")
    parser.add_argument(
        "--singles", type=int, default=1000, help="train conversations about one image (4,000 at most)"
    )
    parser.add_argument("--scenes", type=int, default=2000, help="train conversations about a scene")
    parser.add_argument("--questions_per_scene", type=int, default=12, help="of a train scene (1 to 24)")
    parser.add_argument(
        "--described", type=float, default=1 / 3, help="share of train scenes with a long last answer"
    )
    parser.add_argument("--test_scenes", type=int, default=TEST_SCENES, help="each with four questions")
    parser.add_argument(
        "--test_descriptions", type=int, default=TEST_DESCRIPTIONS, help="long test answers, one a scene"
    )
    parser.add_argument("--hard_scenes", type=int, default=0, help="train conversations about a hard scene")
    parser.add_argument("--hard_questions", type=int, default=8, help="of a hard train scene (1 to 12)")
    args = parser.parse_args(arguments)
    for flag in ("singles", "scenes", "hard_scenes", "test_scenes", "test_descriptions"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag} is {getattr(args, flag)}: give 0 or more")
    if args.singles + args.scenes == 0:
        raise ValueError("--singles and --scenes are both 0: nothing to train on")
    if not 1 <= args.questions_per_scene <= 24:
        raise ValueError(f"--questions_per_scene is {args.questions_per_scene}: give 1 to 24")
    if not 1 <= args.hard_questions <= 12:
        raise ValueError(f"--hard_questions is {args.hard_questions}: give 1 to 12")
    if not 0 <= args.described <= 1:
        raise ValueError(f"--described is {args.described}: give a share from 0 to 1")
    if args.test_descriptions > args.test_scenes:
        raise ValueError(f"--test_descriptions {args.test_descriptions} needs as many --test_scenes")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the conversion; returns the exit status."""
    try:
        args = parse_arguments(arguments)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        left_out = write_test(args.output_dir, args.test_scenes, 4, args.test_descriptions, args.seed)
        print(f"test: {left_out} images whose colour or shape no question states stay out of the scenes")
        left_out = write_train(
            args.output_dir, args.singles, args.scenes, args.questions_per_scene, args.described, args.seed
        )
        print(f"train: {left_out} images whose colour or shape no question states stay out of the scenes")
        if args.hard_scenes:
            write_hard_train(args.output_dir, args.hard_scenes, args.hard_questions, args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
