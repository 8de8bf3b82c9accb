"""`run_vlmevalkit.py`: VLMEvalKit's own command line with our model and datasets and an honest exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import VLMEVALKIT
from dynllava_plugin.evaluation.judges import Judge, find_judge, judge_tasks
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.vlmevalkit_arguments import kit_parser, own_parser, split_modes
from dynllava_plugin.evaluation.vlmevalkit_outcome import check_run, forget_finished, judge_failures
from dynllava_plugin.evaluation.vlmevalkit_setup import (
    MODEL_NAME,
    gather_before_leaving,
    import_kit,
    register,
    use_gloo,
    use_local_data,
    without_judge,
)

DEFAULT_OUTPUT = Path("results/vlmevalkit")
# Their cells must come back as they were written; Excel's don't ("=1+1" becomes 0).
_OWN_DATASETS = {
    "EasyVQA",
    "EasyVQA_Scenes",
    "EasyVQA_Describe",
    "LVIS_VQA_Single",
    "LVIS_VQA_Multi",
    "ShareGPT4V_VQA",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the kit as typed; returns 0, 1 where a dataset failed, 2 where the user can mend the cause."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = own_parser()
    own, forwarded = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        print("\nAll other options are VLMEvalKit's:\n")
    sparsity_mode, kit_mode = split_modes(own.mode or [])
    names = ("pretrained", "device", "dtype", "attn_implementation", "vision_keep_rate", "text_keep_rate")
    values = {name: getattr(own, name) for name in (*names, "image_policy", "random_seed", "policy")}
    settings = ModelSettings.from_dict({**values, "mode": sparsity_mode})
    if own.batch_size < 1 or own.max_new_tokens < 1:
        raise UserError("--batch-size and --max-new-tokens must be positive")
    peek, _ = kit_parser().parse_known_args(forwarded)
    if kit_mode:
        forwarded += ["--mode", kit_mode]
    if peek.model is None and peek.config is None:
        forwarded += ["--model", MODEL_NAME]
    if peek.work_dir is None:
        limit = f"_limit-{peek.limit}" if peek.limit else ""
        peek.work_dir = DEFAULT_OUTPUT / f"{settings.slug()}{limit}"
        forwarded += ["--work-dir", str(peek.work_dir)]
    work_dir = Path(os.environ.get("MMEVAL_ROOT") or peek.work_dir)
    models, datasets = _selected(peek)
    judge = _judge(peek, datasets, forwarded)

    if set(datasets) and set(datasets) <= _OWN_DATASETS:
        os.environ.setdefault("PRED_FORMAT", "tsv")
    kit = import_kit()
    register(settings, batch_size=own.batch_size, max_new_tokens=own.max_new_tokens, prompts=own.prompts)
    if own.data_root is not None:
        use_local_data(own.data_root)
    unjudged = judge_tasks(VLMEVALKIT) & set(datasets) if judge is None else set()
    without_judge(unjudged)
    use_gloo()
    gather_before_leaving()
    if kit_mode != "eval" and not peek.reuse:
        forget_finished(work_dir / MODEL_NAME, MODEL_NAME, datasets)
    started = time.time()
    sys.argv = [sys.argv[0], *forwarded]
    kit.main()
    if int(os.environ.get("RANK", 0)) != 0:
        return 0
    failures = []
    for model in models:
        failures += check_run(work_dir / model, model, datasets, started, unjudged)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if len(models) == 1:
        manifest = {"tasks": datasets, "limit": peek.limit, "prompts": own.prompts, "arguments": arguments}
        _write_manifest(work_dir / models[0], judge, manifest)
    print(f"results: {work_dir}")
    return 1 if failures else 0


def _judge(peek: argparse.Namespace, datasets: list[str], forwarded: list[str]) -> Judge | None:
    """The judge that scores free answers, if one is configured and answers; the kit is told of it."""
    if peek.judge_base_url:
        os.environ["OPENAI_API_URL"] = peek.judge_base_url
    if peek.judge_key:
        os.environ["OPENAI_API_KEY"] = peek.judge_key
    if peek.judge and peek.judge != "exact_matching":
        os.environ["MODEL_VERSION"] = peek.judge
    judge = find_judge(VLMEVALKIT, datasets)
    if judge is None:
        if peek.judge is None:
            # Without a judge the kit asks OpenAI for half a minute, then matches answers by its rules anyway.
            forwarded += ["--judge", "exact_matching"]
        return None
    if peek.judge is None:
        forwarded += ["--judge", judge.model]
    if not peek.judge_base_url:
        forwarded += ["--judge-base-url", judge.url]
    return judge


def _selected(peek: argparse.Namespace) -> tuple[list[str], list[str]]:
    if peek.config is None:
        return peek.model or [MODEL_NAME], peek.data or []
    config = json.loads(Path(peek.config).read_text(encoding="utf-8"))
    return list(config["model"]), list(config["data"])


def _write_manifest(folder: Path, judge: Judge | None, more: dict[str, object]) -> None:
    from dynllava_plugin.evaluation.files import write_json
    from dynllava_plugin.evaluation.records import MANIFEST_NAME, RECORD

    if RECORD.settings is None:
        return  # everything was reused: the earlier run's manifest still holds
    if judge is not None:
        unanswered = judge_failures(folder)
        more["judge"] = {"model": judge.model, "url": judge.url, "unanswered": unanswered}
    write_json(folder / MANIFEST_NAME, RECORD.to_dict(VLMEVALKIT, **more))


if __name__ == "__main__":
    sys.exit(main())
