"""The benchmarks, one row each: everything that adapters, suites, tables and docs know of one stands here."""

from __future__ import annotations

from dynllava_plugin.evaluation.benchmark import PERCENT, Benchmark, Metric, Place
from dynllava_plugin.evaluation.own_sets.text_metrics import METEOR, METEOR_WITHOUT_SYNONYMS


def _one(
    name: str,
    lmms_eval: tuple[str, str, float] | None,
    vlmevalkit: tuple[str, str, float] | None,
    *,
    repo: str,
    split: str,
    metric: str = "accuracy",
    unit: str = PERCENT,
    paper: str = "acc",
    table: str = "1",
    judge: bool = False,
    note: str = "",
) -> Benchmark:
    """A benchmark of one headline figure."""
    places = [Place(*place) if place else None for place in (lmms_eval, vlmevalkit)]
    figure = Metric(metric, places[0], places[1], unit=unit, paper=paper)
    return Benchmark(name, (figure,), split=split, judge=judge, repo=repo, paper_table=table, note=note)


def _newer(
    name: str,
    lmms_eval: tuple[str, str, float] | None,
    vlmevalkit: tuple[str, str, float] | None,
    repo: str,
    split: str,
    metric: str = "accuracy",
    paper: str = "",
    note: str = "",
) -> Benchmark:
    """A benchmark that isn't one of the paper's, or (`paper`) not under this name."""
    return _one(
        name, lmms_eval, vlmevalkit, repo=repo, split=split, metric=metric, paper=paper, table="", note=note
    )


def _submission(name: str, task: str, repo: str, questions: int) -> Benchmark:
    return Benchmark(
        name,
        (Metric("submission", Place(task, "submission")),),
        split="test",
        server=True,
        questions=questions,
        repo=repo,
        note="the run writes the file to upload",
    )


def _long_answers(name: str, task: str, dataset: str, paper_table: str, split: str) -> Benchmark:
    """Perplexity of the reference, METEOR of the answer, and what the output costs in both runs (Table 3)."""
    ppl, answer = f"{task}_ppl", f"{task}_answer"

    def cost(metric: str, paper: str) -> list[Metric]:
        return [
            Metric(
                f"{metric}_{run}_run",
                Place(source, metric),
                Place(dataset, f"{metric}_{run}_run"),
                unit="",
                higher_is_better=False,
                paper=f"{paper}_{run}_run" if paper else "",
            )
            for run, source in (("ppl", ppl), ("meteor", answer))
        ]

    metrics = [
        Metric("ppl", Place(ppl, "ppl"), Place(dataset, "ppl"), unit="", higher_is_better=False, paper="ppl")
    ]
    for meteor in (METEOR, METEOR_WITHOUT_SYNONYMS):
        same = "meteor" if meteor == METEOR else ""
        metrics.append(
            Metric(meteor, Place(answer, meteor, 100), Place(dataset, meteor), paper=same, paper_factor=100)
        )
    metrics += cost("kv_mib", "kv_mib")
    # The paper counts an output token in layers >= l only where it stays as context.
    metrics += cost("decode_tflops_kept", "decode_tflops")
    metrics += cost("decode_tflops", "")
    return Benchmark(name, tuple(metrics), split=split, paper_table=paper_table)


_E = "lmms-lab-encoder/"
_DESCRIBE = "easy_vqa_describe"
BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "easy_vqa",
        (Metric("accuracy", Place("easy_vqa", "exact_match", 100), Place("EasyVQA", "Overall")),),
        split="test",
        extra="demo",
    ),
    Benchmark(
        "easy_vqa_scenes",
        (
            Metric(
                "accuracy",
                Place("easy_vqa_scenes", "exact_match", 100),
                Place("EasyVQA_Scenes", "Overall"),
            ),
        ),
        split="test",
        extra="demo",
    ),
    Benchmark(
        "easy_vqa_hard",
        (Metric("accuracy", Place("easy_vqa_hard", "exact_match", 100), Place("EasyVQA_Hard", "Overall")),),
        split="test",
        extra="demo",
    ),
    Benchmark(
        _DESCRIBE,
        (
            Metric(
                "ppl",
                Place("easy_vqa_describe_ppl", "ppl"),
                Place("EasyVQA_Describe", "ppl"),
                unit="",
                higher_is_better=False,
            ),
            *(
                Metric(name, Place("easy_vqa_describe_answer", name, 100), Place("EasyVQA_Describe", name))
                for name in (METEOR, METEOR_WITHOUT_SYNONYMS)
            ),
        ),
        split="test",
        extra="demo",
    ),
    # The paper's twelve, MME and LLaVA-Wild, by the harnesses' own tasks and datasets.
    _one(
        "VQAv2",
        ("vqav2_val", "exact_match", 100),
        ("VQAv2_VAL", "Overall", 1),
        repo=f"{_E}VQAv2",
        split="validation",
        note="the paper reports test-dev (server); here the validation split",
    ),
    _one(
        "GQA",
        ("gqa", "exact_match", 100),
        ("GQA_TestDev_Balanced", "Overall", 1),
        repo=f"{_E}GQA",
        split="testdev balanced",
    ),
    _one(
        "VizWiz",
        ("vizwiz_vqa_val", "exact_match", 100),
        ("VizWiz", "Overall", 1),
        repo=f"{_E}VizWiz-VQA",
        split="val",
        table="12",
        note="the paper reports test-dev (server); here the validation split",
    ),
    _one(
        "SciQA",
        ("scienceqa_img", "exact_match", 100),
        ("ScienceQA_TEST", "Overall", 100),
        repo=f"{_E}ScienceQA",
        split="test, with image",
    ),
    _one(
        "TextVQA",
        ("textvqa_val", "exact_match", 100),
        ("TextVQA_VAL", "Overall", 1),
        repo=f"{_E}textvqa",
        split="validation",
        note="LLaVA-1.5's own prompt lists the image's OCR tokens; the harnesses' prompts don't",
    ),
    _one(
        "POPE",
        ("pope", "pope_f1_score", 100),
        ("POPE", "Overall", 1),
        metric="f1",
        paper="f1",
        repo=f"{_E}POPE",
        split="test",
        note="F1 of all three categories pooled; LLaVA's script averages the categories' F1",
    ),
    _one(
        "MME",
        ("mme", "mme_perception_score", 1),
        ("MME", "perception", 1),
        metric="perception",
        unit="",
        paper="perception",
        repo=f"{_E}MME",
        split="test",
    ),
    _one(
        "MMBench",
        ("mmbench_en_dev_static", "gpt_eval_score", 1),
        ("MMBench_DEV_EN", "Overall", 100),
        repo=f"{_E}MMBench",
        split="en, dev",
        note="answers are matched by rules, no judge",
    ),
    _one(
        "SEED",
        ("seedbench", "seed_image", 100),
        ("SEEDBench_IMG", "Overall", 100),
        repo=f"{_E}SEED-Bench",
        split="test, images",
    ),
    _one(
        "MM-Vet",
        ("mmvet", "gpt_eval_score", 1),
        ("MMVet", "Category=Overall|acc", 1),
        metric="score",
        paper="score",
        table="12",
        judge=True,
        repo=f"{_E}MMVet",
        split="test",
    ),
    _one(
        "LLaVA-Wild",
        ("llava_in_the_wild", "gpt_eval_llava_all", 1),
        ("LLaVABench", "split=overall|Relative Score (main)", 1),
        metric="score",
        paper="score",
        table="12",
        judge=True,
        repo=f"{_E}llava-bench-in-the-wild",
        split="train (its only one)",
    ),
    _one(
        "MMVP",
        ("mmvp", "mmvp_pair_accuracy", 100),
        ("MMVP", "Overall", 100),
        metric="pair_accuracy",
        repo="lmms-lab-eval/MMVP",
        split="train (its only one)",
    ),
    _one(
        "RealWorldQA",
        ("realworldqa", "exact_match", 100),
        ("RealWorldQA", "Overall", 100),
        repo=f"{_E}RealWorldQA",
        split="test",
    ),
    _one(
        "CVBench-2D",
        ("cv_bench_2d", "cv_bench_acc", 100),
        ("CV-Bench-2D", "Overall", 100),
        repo="nyu-visionx/CV-Bench",
        split="2D, test",
        note="lmms-eval takes the mean over questions, VLMEvalKit the mean over the two sources",
    ),
    # What newer models are measured on, none of it in the paper.
    _newer(
        "DocVQA",
        ("docvqa_val", "anls", 100),
        ("DocVQA_VAL", "Overall", 1),
        f"{_E}DocVQA",
        "validation",
        "anls",
    ),
    _newer(
        "InfoVQA",
        ("infovqa_val", "anls", 100),
        ("InfoVQA_VAL", "Overall", 1),
        f"{_E}DocVQA",
        "validation",
        "anls",
    ),
    _newer(
        "ChartQA",
        ("chartqa", "relaxed_overall", 100),
        ("ChartQA_TEST", "Overall", 1),
        f"{_E}ChartQA",
        "test, human and augmented",
        "relaxed_accuracy",
    ),
    _newer(
        "OCRBench",
        ("ocrbench", "ocrbench_accuracy", 100),
        ("OCRBench", "Final Score Norm", 1),
        "echo840/OCRBench",
        "test",
        note="right answers of 1,000, also where fewer were asked",
    ),
    _newer("AI2D", ("ai2d", "exact_match", 100), ("AI2D_TEST", "Overall", 100), f"{_E}ai2d", "test"),
    _newer("MMStar", ("mmstar", "average", 100), ("MMStar", "Overall", 100), "Lin-Chen/MMStar", "val"),
    _newer(
        "MMMU",
        ("mmmu_val", "mmmu_acc", 100),
        ("MMMU_DEV_VAL", "split=validation|Overall", 100),
        f"{_E}MMMU",
        "validation",
        note="VLMEvalKit's file holds the dev split, too; its 150 questions are asked and not counted",
    ),
    _newer(
        "MMBench-CN",
        ("mmbench_cn_dev_static", "gpt_eval_score", 1),
        ("MMBench_DEV_CN", "Overall", 100),
        f"{_E}MMBench",
        "cn, dev",
        note="answers are matched by rules, no judge",
    ),
    _newer(
        "AMBER",
        None,
        ("AMBER", "Avg ACC", 1),
        "yifanzhang114/AMBER_base64",
        "discriminative",
        note="hallucination: yes or no",
    ),
    _newer(
        "TextVQA-OCR",
        ("textvqa_val_ocr", "exact_match", 100),
        None,
        f"{_E}textvqa",
        "validation",
        paper="acc",
        note="with the image's OCR tokens in the prompt, as LLaVA-1.5's own evaluation asks it",
    ),
    # Answers that only a server has.
    _submission("VQAv2-test", "vqav2_test", f"{_E}VQAv2", 447_793),
    _submission("VizWiz-test", "vizwiz_vqa_test", f"{_E}VizWiz-VQA", 8_000),
    _submission("TextVQA-test", "textvqa_test", f"{_E}textvqa", 5_734),
    # Long answers, from `dynllava build-lvis`.
    _long_answers("LVIS-VQA single", "lvis_vqa_single", "LVIS_VQA_Single", "3", "1,000 samples of one round"),
    _long_answers(
        "LVIS-VQA multi", "lvis_vqa_multi", "LVIS_VQA_Multi", "3", "1,000 samples of more than seven rounds"
    ),
    _long_answers("ShareGPT4V-VQA", "sharegpt4v_vqa", "ShareGPT4V_VQA", "3", "captions of 300 words or more"),
)
