"""The benchmarks: our name for each, and where each harness says which figure of it."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.evaluation.text_metrics import METEOR, METEOR_WITHOUT_SYNONYMS

PERCENT = "%"


@dataclass(frozen=True)
class Metric:
    """One figure of a benchmark.

    Attributes
    ----------
    name : str
        Our name.
    lmms_eval : tuple of (task, key, factor) or None
        Where lmms-eval's results file has it, and what brings it to `unit`.
    vlmevalkit : tuple of (dataset, key, factor) or None
        The same in VLMEvalKit's `status.json`.
    unit : str
        ``%``, or empty for perplexity and scores.
    higher_is_better : bool
    """

    name: str
    lmms_eval: tuple[str, str, float] | None
    vlmevalkit: tuple[str, str, float] | None
    unit: str = PERCENT
    higher_is_better: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its metrics, the first one the headline.

    Attributes
    ----------
    name : str
    metrics : tuple of Metric
    judge : bool
        Whether a harness needs a judge model to score it.
    """

    name: str
    metrics: tuple[Metric, ...]
    judge: bool = False


def _accuracy(
    name: str,
    lmms_eval: tuple[str, str, float] | None,
    vlmevalkit: tuple[str, str, float] | None,
    metric: str = "accuracy",
    judge: bool = False,
) -> Benchmark:
    return Benchmark(name, (Metric(metric, lmms_eval, vlmevalkit),), judge)


_DESCRIBE = "easy_vqa_describe_answer"
BENCHMARKS: tuple[Benchmark, ...] = (
    _accuracy("easy_vqa", ("easy_vqa", "exact_match", 100), ("EasyVQA", "Overall", 1)),
    _accuracy("easy_vqa_scenes", ("easy_vqa_scenes", "exact_match", 100), ("EasyVQA_Scenes", "Overall", 1)),
    Benchmark(
        "easy_vqa_describe",
        (
            Metric(
                "ppl",
                ("easy_vqa_describe_ppl", "ppl", 1),
                ("EasyVQA_Describe", "ppl", 1),
                unit="",
                higher_is_better=False,
            ),
            Metric(METEOR, (_DESCRIBE, METEOR, 100), ("EasyVQA_Describe", METEOR, 1)),
            Metric(
                METEOR_WITHOUT_SYNONYMS,
                (_DESCRIBE, METEOR_WITHOUT_SYNONYMS, 100),
                ("EasyVQA_Describe", METEOR_WITHOUT_SYNONYMS, 1),
            ),
        ),
    ),
    # The paper's twelve, by the harnesses' own tasks and datasets.
    _accuracy("VQAv2", ("vqav2_val", "exact_match", 100), None),
    _accuracy("GQA", ("gqa", "exact_match", 100), ("GQA_TestDev_Balanced", "Overall", 1)),
    _accuracy("VizWiz", ("vizwiz_vqa_val", "exact_match", 100), ("VizWiz", "Overall", 1)),
    _accuracy("SciQA", ("scienceqa_img", "exact_match", 100), ("ScienceQA_TEST", "Overall", 100)),
    _accuracy("TextVQA", ("textvqa_val", "exact_match", 100), ("TextVQA_VAL", "Overall", 1)),
    _accuracy("POPE", ("pope", "pope_f1_score", 100), ("POPE", "Overall", 1), metric="f1"),
    _accuracy("MMBench", ("mmbench_en_dev_static", "gpt_eval_score", 1), ("MMBench_DEV_EN", "Overall", 100)),
    _accuracy("SEED", ("seedbench", "seed_image", 100), ("SEEDBench_IMG", "Overall", 100)),
    _accuracy("MM-Vet", ("mmvet", "gpt_eval_score", 1), ("MMVet", "Overall", 1), "score", judge=True),
    _accuracy("MMVP", ("mmvp", "mmvp_pair_accuracy", 100), ("MMVP", "Overall", 100), metric="pair_accuracy"),
    _accuracy("RealWorldQA", ("realworldqa", "exact_match", 100), ("RealWorldQA", "Overall", 100)),
    _accuracy("CVBench-2D", ("cv_bench_2d", "cv_bench_acc", 100), ("CV-Bench-2D", "Overall", 100)),
)


def find_metrics(harness: str, task: str) -> list[tuple[Benchmark, Metric, str, float]]:
    """What a harness's task or dataset reports: (benchmark, metric, its key, factor to our unit)."""
    found = []
    for benchmark in BENCHMARKS:
        for metric in benchmark.metrics:
            place = metric.lmms_eval if harness == "lmms-eval" else metric.vlmevalkit
            if place is not None and place[0] == task:
                found.append((benchmark, metric, place[1], place[2]))
    return found


def unit_of(metric: str) -> str:
    """The unit of a metric of ours."""
    for benchmark in BENCHMARKS:
        for item in benchmark.metrics:
            if item.name == metric:
                return item.unit
    return ""
