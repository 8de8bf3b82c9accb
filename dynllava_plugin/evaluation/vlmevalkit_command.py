"""`run_vlmevalkit.py`: VLMEvalKit's own command line with our model and datasets and an honest exit code."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.settings import DEFAULT_CHECKPOINT, ModelSettings
from dynllava_plugin.evaluation.vlmevalkit_outcome import check_run, forget_finished
from dynllava_plugin.policies import POLICIES
from dynllava_plugin.sparsity.config import IMAGE_POLICIES, MODES

DEFAULT_OUTPUT = Path("results/vlmevalkit")
HARNESS = "vlmevalkit"
MODEL_NAME = "dynllava"
KIT_MODES = ("all", "infer", "eval")


def main(arguments: list[str] | None = None) -> int:
    """Run the kit as typed; returns 0, 1 where a dataset failed, 2 where the user can mend the cause."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = _own_parser()
    own, forwarded = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        print("\nAll other options are VLMEvalKit's:\n")
    sparsity_mode, kit_mode = _split_modes(own.mode or [])
    names = ("pretrained", "device", "dtype", "attn_implementation", "vision_keep_rate", "text_keep_rate")
    values = {name: getattr(own, name) for name in (*names, "image_policy", "random_seed", "policy")}
    settings = ModelSettings.from_dict({**values, "mode": sparsity_mode})
    if own.batch_size < 1 or own.max_new_tokens < 1:
        raise UserError("--batch-size and --max-new-tokens must be positive")
    peek, _ = _kit_parser().parse_known_args(forwarded)
    if kit_mode:
        forwarded += ["--mode", kit_mode]
    if peek.model is None and peek.config is None:
        forwarded += ["--model", MODEL_NAME]
    if peek.work_dir is None:
        limit = f"_limit-{peek.limit}" if peek.limit else ""
        peek.work_dir = DEFAULT_OUTPUT / f"{settings.slug()}{limit}"
        forwarded += ["--work-dir", str(peek.work_dir)]
    work_dir = Path(os.environ.get("MMEVAL_ROOT") or peek.work_dir)

    if set(peek.data or []) and set(peek.data or []) <= {"EasyVQA", "EasyVQA_Scenes", "EasyVQA_Describe"}:
        # Excel cells don't keep every text as it is (a prediction "=1+1" becomes 0).
        os.environ.setdefault("PRED_FORMAT", "tsv")
    kit = _import_kit()
    _register(settings, own.batch_size, own.max_new_tokens)
    if not torch_has_gpu():
        _use_gloo()
    if kit_mode != "eval" and not peek.reuse:
        forget_finished(work_dir / MODEL_NAME, MODEL_NAME, peek.data or [])
    started = time.time()
    sys.argv = [sys.argv[0], *forwarded]
    kit.main()
    if int(os.environ.get("RANK", 0)) != 0:
        return 0
    models, datasets = _selected(peek)
    failures = []
    for model in models:
        failures += check_run(work_dir / model, model, datasets, started)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if len(models) == 1:
        _write_manifest(work_dir / models[0], datasets, peek.limit, arguments)
    print(f"results: {work_dir}")
    return 1 if failures else 0


def _own_parser() -> argparse.ArgumentParser:
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
    add("--random-seed", "--random_seed", type=int, help="of --image-policy random")
    add("--device", help="cpu, cuda, cuda:0, ...")
    add("--dtype", help="float32, bfloat16, float16, auto")
    add("--attn-implementation", "--attn_implementation", help="sdpa, eager, flash_attention_2")
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
    return parser


def _kit_parser() -> argparse.ArgumentParser:
    """The kit's options that we need to know about; they all go on to the kit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--config")
    parser.add_argument("--work-dir")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--reuse", action="store_true")
    return parser


def _split_modes(values: list[str]) -> tuple[str | None, str | None]:
    """`--mode` names two things, how the model runs and which of the kit's stages; their values differ."""
    ours, kits = [v for v in values if v in MODES], [v for v in values if v in KIT_MODES]
    unknown = [value for value in values if value not in (*MODES, *KIT_MODES)]
    if unknown:
        choices = f"choose {', '.join(MODES)} for the model or {', '.join(KIT_MODES)} for the kit"
        raise UserError(f"--mode: unknown value {unknown[0]!r}; {choices}")
    if len(ours) > 1 or len(kits) > 1:
        raise UserError(f"--mode: {' and '.join(values)} contradict each other")
    return (ours[0] if ours else None), (kits[0] if kits else None)


def _import_kit() -> ModuleType:
    """The kit's command line: the package's ``vlmeval.run``, or an upstream checkout's ``run.py``.

    It is imported before CUDA is used, because it assigns each process its GPUs.
    """
    try:
        package = importlib.import_module("vlmeval")
    except ModuleNotFoundError as error:
        if error.name != "vlmeval":
            raise
        raise UserError(
            "VLMEvalKit isn't installed: run `pip install ms-vlmeval` or install a checkout"
        ) from None
    try:
        return importlib.import_module("vlmeval.run")
    except ModuleNotFoundError as error:
        if error.name != "vlmeval.run":
            raise
    path = Path(str(package.__file__)).parents[1] / "run.py"
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"VLMEvalKit: neither vlmeval.run nor {path} exists; reinstall it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _register(settings: ModelSettings, batch_size: int, max_new_tokens: int) -> None:
    """Make the model and the datasets known to the kit, in place."""
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from dynllava_plugin.evaluation import vlmevalkit_datasets
    from dynllava_plugin.evaluation.records import RECORD
    from dynllava_plugin.evaluation.vlmevalkit_model import DynamicLlava

    RECORD.clear()
    given = {key: value for key, value in settings.to_dict().items() if value is not None}
    build = partial(DynamicLlava, batch_size=batch_size, max_new_tokens=max_new_tokens, **given)
    supported_VLM[MODEL_NAME] = partial(_build_or_exit, build)
    vlmeval.vlm.DynamicLlava = DynamicLlava
    vlmevalkit_datasets.register()


def _build_or_exit(build: Any) -> Any:
    """A checkpoint that can't be loaded ends the run: the kit would try it again for each dataset."""
    try:
        return build()
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def torch_has_gpu() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def _use_gloo() -> None:
    """The kit asks for NCCL; without GPUs several processes talk through gloo."""
    import torch.distributed as dist

    initialize = dist.init_process_group

    def with_gloo(*args: Any, **kwargs: Any) -> Any:
        return initialize(*args, **{**kwargs, "backend": "gloo"})

    dist.init_process_group = with_gloo


def _selected(peek: argparse.Namespace) -> tuple[list[str], list[str]]:
    if peek.config is None:
        return peek.model or [MODEL_NAME], peek.data or []
    config = json.loads(Path(peek.config).read_text(encoding="utf-8"))
    return list(config["model"]), list(config["data"])


def _write_manifest(folder: Path, datasets: list[str], limit: int | None, arguments: list[str]) -> None:
    from dynllava_plugin.evaluation.files import write_json
    from dynllava_plugin.evaluation.records import MANIFEST_NAME, RECORD

    if RECORD.settings is None:
        return  # everything was reused: the earlier run's manifest still holds
    write_json(
        folder / MANIFEST_NAME, RECORD.to_dict(HARNESS, tasks=datasets, limit=limit, arguments=arguments)
    )
