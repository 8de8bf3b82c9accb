"""`dynllava compare`: intervals, costs, the table, and the command on a few questions."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from dynllava_plugin import load_model
from dynllava_plugin.cli import main
from dynllava_plugin.compare import picture
from dynllava_plugin.compare.answers import Figure, forgetful
from dynllava_plugin.compare.bootstrap import interval, resampled
from dynllava_plugin.compare.literature import COLUMNS, published
from dynllava_plugin.compare.measuring import cache_kib
from dynllava_plugin.compare.picture import draw, draw_policies, highlighted
from dynllava_plugin.compare.report import claims_table, field_table, make_table
from dynllava_plugin.compare.store import Store
from dynllava_plugin.compare.subjects import DEFAULT_POLICIES, KEEP, TOKENS, Subject, runnable, subjects
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.journal import Journal
from dynllava_plugin.files import write_figure
from dynllava_plugin.policies import policy_of, registry
from dynllava_plugin.policies.contexts import context_of
from dynllava_plugin.policies.registry import POLICIES
from dynllava_plugin.sparsity.config import SparsityConfig
from tests.families.checkpoints import write_checkpoint
from tests.property_tests import examples
from tests.tiny_random import TOKENS_PER_IMAGE, batch_of, random_model, random_sample

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = SparsityConfig()


def mean(items: list[float]) -> float:
    return sum(items) / len(items)


@examples(10)
@given(seed=st.integers(0, 999), questions=st.integers(5, 60))
def test_bootstrap_draws_questions(seed, questions):
    """Against drawing question numbers by hand; policies with as many questions share their draws."""
    scores = np.random.default_rng(seed).random(questions)
    draws = resampled(scores.tolist(), mean, "GQA", 400)
    shifted = resampled((scores + 1).tolist(), mean, "GQA", 400)
    assert np.allclose(shifted - draws, 1)
    rng = np.random.default_rng(seed + 1)
    by_hand = np.array([scores[rng.integers(0, questions, questions)].mean() for _ in range(400)])
    spread = scores.std() / questions**0.5
    assert abs(draws.mean() - scores.mean()) < 4 * spread / 20 + 1e-9
    assert abs(draws.std() - by_hand.std()) < 0.35 * spread + 1e-9
    low, high = interval(draws)
    assert low <= scores.mean() <= high


def test_figures_that_are_no_means_are_resampled_by_the_harness_own_aggregation():
    """MME's sums, which assert two answers an image, POPE's F1, MMVP's pairs, and one that refuses a part."""
    from lmms_eval.tasks.mme.utils import mme_aggregate_results
    from lmms_eval.tasks.mmvp.utils import mmvp_aggregate_pair_results
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    rng = random.Random(0)
    right = [rng.random() < 0.7 for _ in range(80)]
    mme = [
        {"question_id": f"{place // 2}", "category": "color" if place < 40 else "count", "score": float(hit)}
        for place, hit in enumerate(right)
    ]
    draws = resampled(mme, mme_aggregate_results, "MME", 200)
    value = mme_aggregate_results(mme)
    assert draws.std() > 1 and abs(draws.mean() - value) < 4 * draws.std() / 200**0.5
    pope = [
        {
            "question_id": place,
            "prediction": "yes" if hit else "no",
            "ground_truth": "yes" if place % 2 else "no",
        }
        for place, hit in enumerate(right)
    ]
    draws = resampled(pope, pope_aggregate_f1_score, "POPE", 200)
    assert draws.std() > 0.01 and abs(draws.mean() - pope_aggregate_f1_score(pope)) < 0.05
    pairs = [{"pair_index": place // 2, "is_correct": hit} for place, hit in enumerate(right)]
    draws = resampled(pairs, mmvp_aggregate_pair_results, "MMVP", 200)
    both = [right[place] and right[place + 1] for place in range(0, 80, 2)]
    assert np.allclose(draws, resampled([float(hit) for hit in both], mean, "MMVP", 200))

    def whole_only(items: list[float]) -> float:
        assert len(items) == 80
        return 1.0

    assert resampled(right, whole_only, "x", 10) is None


def test_an_aggregation_that_keeps_count_begins_anew_at_every_call(tmp_path: Path):
    """OCRBench's adds to a dictionary of its module."""
    from lmms_eval.tasks.ocrbench.utils import ocrbench_aggregate_accuracy

    rows = [{"question_type": "Doc-oriented VQA", "score": place % 2} for place in range(10)]
    aggregate = partial(forgetful(ocrbench_aggregate_accuracy), args=Namespace(output_path=str(tmp_path)))
    assert aggregate(rows) == aggregate(rows) == 5 / 1000
    assert resampled(rows, aggregate, "OCRBench", 50).mean() == pytest.approx(0.005, abs=0.001)


def test_a_policy_that_was_rewritten_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures, times and half-asked benchmarks belong to the rule as it was; those of other policies stay."""
    file = tmp_path / "middle.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from dynllava_plugin.policies.base import ImagePolicy\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Middle(ImagePolicy):\n"
        "    name = 'middle'\n"
        "    layer: int = 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(POLICIES, "middle", importlib.import_module("middle").Middle)
    store = Store(tmp_path / "runs", {"checkpoint": "tiny"})
    mine, scheduled, other = (
        Subject(text, None, text) for text in ("middle", "schedule,steps=2:middle:0.5", "fastv")
    )
    for subject in (mine, scheduled, other):
        store.write("gqa", subject, {"figures": []}, limit=3)
        assert store.read("gqa", subject, limit=3)
    journal = store.journal("gqa", mine, limit=3)
    file.write_text(file.read_text() + "    # another rule\n")
    assert not store.read("gqa", mine, limit=3) and not store.read("gqa", scheduled, limit=3)
    assert store.read("gqa", other, limit=3) and store.journal("gqa", mine, limit=3) != journal
    assert [subject for subject, _ in store.everything("gqa")] == [other]
    store.write("gqa", mine, {"figures": []}, limit=3)
    monkeypatch.delitem(POLICIES, "middle")  # and one that is no more is no row
    registry._policy.cache_clear()
    assert [subject for subject, _ in store.everything("gqa")] == [other]


def test_paired_differences_are_narrower_than_single_intervals():
    rng = np.random.default_rng(0)
    first = (rng.random(300) < 0.5).astype(float)
    second = first.copy()
    second[:6] = 1 - second[:6]
    draws = [resampled(scores.tolist(), mean, "GQA") for scores in (first, second)]
    single = np.subtract(*interval(draws[0])[::-1])
    paired = np.subtract(*interval(draws[0] - draws[1])[::-1])
    assert paired < single / 3
    assert interval(draws[0] - draws[0]) == (0.0, 0.0)


def test_subjects_are_policies_at_budgets():
    policies = ["full", "fastv,k=2", "fastv,r=0.5", "h2o", "fastv+h2o", "structure"]
    found = subjects(policies, KEEP, [0.4, 0.2])
    assert [(s.policy, s.keep) for s in found] == [
        ("full", None), ("fastv,k=2,keep=0.4", 0.4), ("fastv,k=2,keep=0.2", 0.2), ("fastv,r=0.5", None),
        ("h2o,r=0.4", 0.4), ("h2o,r=0.2", 0.2), ("fastv+h2o,keep=0.4", 0.4), ("fastv+h2o,keep=0.2", 0.2),
        ("structure", None),
    ]  # fmt: skip
    found = subjects(["full", "fastv", "h2o"], TOKENS, [192, 64.5])
    assert [(s.policy, s.tokens, s.title) for s in found] == [
        ("full", None, "full"), ("fastv,tokens=192", 192, "fastv at 192 tokens"),
        ("fastv,tokens=64.5", 64.5, "fastv at 64.5 tokens"), ("h2o", None, "h2o"),
    ]  # fmt: skip
    everything = subjects(DEFAULT_POLICIES, KEEP, [0.4, 0.2, 0.1])
    assert len(everything) == 1 + 3 * (len(DEFAULT_POLICIES) - 1) + 1  # PruMerge+ by its own rule as well
    assert [s.policy for s in everything if s.keep is None] == ["full", "prumerge+"]
    assert {"full", "image", "image_text", "fastv", "h2o", "fastv+h2o", "downsample"} <= set(DEFAULT_POLICIES)
    assert not {"text", "random_text", "structure"} & set(DEFAULT_POLICIES)  # output text alone


@pytest.mark.parametrize(
    ("policies", "kind", "budget", "problem"),
    [
        (["fast"], KEEP, 0.2, "policy: unknown value 'fast'"),
        (["full", "full"], KEEP, 0.2, "--policies: full is named twice"),
        (["full"], KEEP, 0.0, r"--keep: 0 is outside \(0, 1\]"),
        (["full"], TOKENS, 0.5, "--tokens: 0.5 is less than one token"),
    ],
)
def test_wrong_subjects_are_named(policies, kind, budget, problem):
    with pytest.raises(UserError, match=problem):
        subjects(policies, kind, [budget])


def test_what_cannot_run_is_refused_by_name_and_listed_otherwise():
    """16 image tokens, 5 layers."""
    model = random_model()
    named = subjects(["full", "random", "fastv"], TOKENS, [8, 7])
    with pytest.raises(
        UserError, match="fastv: no setting of it leaves tokens=8 of an image's 16; the nearest is 10"
    ):
        runnable(named, model, listed=False)
    able, reasons = runnable(named, model, listed=True)
    assert [subject.title for subject in able] == ["full", "random at 8 tokens", "random at 7 tokens"]
    assert [titles for titles in reasons.values()] == [["fastv at 8 tokens"], ["fastv at 7 tokens"]]
    model.fresh_predictors = True
    able, reasons = runnable(subjects(["full", "image", "random"], KEEP, [0.5]), model, listed=True)
    assert reasons == {"needs predictors, and this checkpoint has none that were trained": ["image at 50%"]}
    with pytest.raises(
        UserError, match="none can run here; random at 99 tokens: tokens=99, but an image has 16"
    ):
        runnable(subjects(["full", "random"], TOKENS, [99]), model, listed=True)


def context(policy: str, kept: float):
    made = policy_of(SparsityConfig(policy=policy, policy_args={}))
    return context_of(made, 6, 24, kept, 16, 0.25)


def test_contexts_say_where_tokens_go():
    full, fastv, divprune = context("full", 24), context("fastv", 5), context("divprune", 5)
    assert (full.split, full.kept_images, full.text_keep) == (6, 24, 1.0)
    assert (fastv.split, fastv.images, fastv.kept_images, fastv.text) == (3, 24, 5, 16)
    assert divprune.held(6, 0) == 6 * 21 and not divprune.image_predictor
    learned = context("image_text", 5)
    assert learned.image_predictor and learned.text_predictor and learned.text_keep == 0.25
    assert context("structure", 24).text_keep == context("random_text", 24).text_keep == 0.5
    h2o = context("h2o", 24)  # the prompt is attended whole, half of it is held
    assert (h2o.split, h2o.kept_images, h2o.held(6, 0)) == (2, 24, 2 * 40 + 4 * 20)


def held_bytes(model, inputs, answer, mask) -> float:
    """What the cache holds after the answers, fed token by token: bytes of a sample's keys and values."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    attended = inputs["attention_mask"]
    for step in range(answer.shape[1]):
        attended = torch.cat([attended, mask[:, step : step + 1]], 1)
        out = model(answer[:, step : step + 1], attention_mask=attended, past_key_values=out.past_key_values)
    held = 0.0
    for layer in out.past_key_values.layers:
        slots = layer.keys.shape[0] * layer.keys.shape[2]
        held += float(layer.track.lengths.sum()) * 2 * layer.keys.numel() * layer.keys.element_size() / slots
    return held / len(answer)


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "kept"),
    [("full", 16), ("fastv,k=2,r=0.75", 4), ("divprune,keep=0.25", 4), ("pyramiddrop,keep=0.25", 4)],
)
def test_the_cache_holds_what_is_counted(policy, kept):
    """Means over two samples, one image each."""
    model = random_model()
    rng = random.Random(0)
    samples = [random_sample(rng, 1, 3), random_sample(rng, 1, 6)]
    answer = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model.set_sparsity(policy=policy)
    counts = {
        "prompt_tokens": sum(len(sample.ids) for sample in samples) / 2,
        "image_tokens": TOKENS_PER_IMAGE, "kept_image_tokens": kept, "generated_tokens": 4, "kept_output_share": 1.0,
    }  # fmt: skip
    counted = cache_kib(model, policy_of(model.config.sparsity).of_depth(5), counts)["cache_kib"]
    assert counted == held_bytes(model, batch_of(samples), answer, mask) / 1024


def figure(metric: str, scores: list[float], benchmark: str) -> Figure:
    return Figure(metric, mean(scores), len(scores), resampled(scores, mean, benchmark).tolist())


def test_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    full = (100 * (rng.random(200) < 0.9)).tolist()
    worse = [100.0 * (score > 0 and index % 5 > 0) for index, score in enumerate(full)]
    ppl = (1 + rng.random(30)).tolist()
    whole, fastv, h2o = (
        Subject("full", None, "full"),
        Subject("fastv", 0.2, "fastv"),
        Subject("h2o", 0.5, "h2o"),
    )
    scenes, describe = "easy_vqa_scenes", "easy_vqa_describe"
    table = make_table(
        [
            (fastv, scenes, [figure("accuracy", worse, scenes)], {"equivalent_tokens": 30, "prefill_ms": 4}),
            (whole, scenes, [figure("accuracy", full, scenes)], {"equivalent_tokens": 64, "prefill_ms": 5}),
            (whole, describe, [figure("ppl", ppl, describe)], {"cache_kib": 10}),
            (fastv, describe, [figure("ppl", ppl, describe)], {"equivalent_tokens": 30}),
            (h2o, describe, [figure("ppl", [2 * p for p in ppl], describe)], {"cache_kib": 6}),
            (Subject("other", None, "other"), "POPE", [Figure("f1", 80.0, 9)], {}),
        ]
    )
    rows = {(row.policy, row.benchmark): row for row in table.itertuples()}
    pruned, base = rows["fastv", scenes], rows["full", scenes]
    assert pruned.behind_full == pytest.approx(base.value - pruned.value) and pruned.n == 200
    assert 0 < pruned.behind_low < pruned.behind_full < pruned.behind_high
    assert pruned.percent == pytest.approx(100 * pruned.value / base.value)
    assert pruned.percent_low < pruned.percent < pruned.percent_high < 100
    assert (base.behind_full, base.behind_low, base.behind_high, base.percent) == (0, 0, 0, 100)
    assert base.low < base.value < base.high
    assert rows["h2o", describe].behind_full > 0 and rows["h2o", describe].percent == pytest.approx(
        50
    )  # less is better
    assert pd.isna(rows["other", "POPE"].low) and pd.isna(rows["other", "POPE"].percent)
    # The mean is of who was asked all that full context was asked.
    averaged = table[table["benchmark"] == "mean"].set_index("policy")
    assert set(averaged.index) == {"full", "fastv"}
    assert averaged.loc["fastv", "percent"] == pytest.approx((pruned.percent + 100) / 2)
    assert averaged.loc["fastv", "percent_low"] < averaged.loc["fastv", "percent"] < 100
    required = ["policy", "keep", "benchmark", "metric", "value", "n", "equivalent_tokens", "prefill_ms"]
    assert list(table.columns[: len(required)]) == required
    text = field_table(table)
    lines = text.splitlines()
    assert (
        "easy_vqa_scenes accuracy (n = 200)" in lines[0]
        and "cache KiB" in lines[0]
        and "mean % of full" in lines[0]
    )
    assert lines[2].startswith("| full | - |") and f"{pruned.value:.2f}, {pruned.percent:.1f}% (" in text
    shown = []
    monkeypatch.setattr(
        picture, "write_figure", lambda path, one: (shown.append(one), write_figure(path, one))
    )
    for name, drawn in (("picture", draw), ("policies", draw_policies)):
        drawn(
            pd.concat(
                [
                    table,
                    table[table["policy"] != "full"].assign(
                        equivalent_tokens=lambda rows: rows["equivalent_tokens"] - 0.5
                    ),
                ]
            ),
            tmp_path / f"{name}.png",
        )
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    drawn = [axis for one in shown for axis in one.axes if axis.get_visible()]
    assert len(drawn) == 4 and all(axis.get_title("left") != "POPE" for axis in drawn)  # nothing to see there
    assert any(axis.get_ylabel() == "accuracy [%]" for axis in drawn)
    for axis in drawn:  # the dot of the last point isn't cut in half
        assert axis.get_xlim()[1] > 1.02 * 30


def test_several_trainings_have_their_mean_and_spread() -> None:
    """A policy is compared with full context in the checkpoints that it was asked in: `random` in the first only."""
    rng = np.random.default_rng(1)
    scenes, cost = "easy_vqa_scenes", {"equivalent_tokens": 30}
    scores = {
        name: [(100.0 * (rng.random(90) < share)).tolist() for share in shares]
        for name, shares in (("full", (0.9, 0.8)), ("image", (0.7, 0.5)), ("random", (0.4,)))
    }
    measured = [
        [
            (
                Subject(name, None if name == "full" else 0.2, name),
                scenes,
                [figure("accuracy", of[seed], scenes)],
                cost,
            )
            for name, of in scores.items()
            if seed < len(of)
        ]
        for seed in (0, 1)
    ]
    table = make_table(*measured)
    rows = {row.policy: row for row in table.itertuples()}
    means = {name: [mean(one) for one in of] for name, of in scores.items()}
    assert rows["image"].value == pytest.approx(mean(means["image"]))
    assert (rows["image"].highest, rows["image"].lowest) == tuple(means["image"])
    behind = [full - ours for full, ours in zip(means["full"], means["image"], strict=True)]
    assert rows["image"].behind_full == pytest.approx(mean(behind)) and rows["image"].trainings == 2
    assert rows["random"].behind_full == pytest.approx(means["full"][0] - means["random"][0])
    assert rows["random"].trainings == 1
    alone = make_table(measured[0]).set_index("policy").loc["random"]
    assert (rows["random"].behind_low, rows["random"].behind_high) == (alone.behind_low, alone.behind_high)
    # Questions are drawn once for both checkpoints.
    both = [(100 * (a + b) / 200) for a, b in zip(*scores["image"], strict=True)]
    assert (rows["image"].low, rows["image"].high) == pytest.approx(
        interval(resampled(both, mean, scenes)), abs=1e-6
    )
    assert f"[{means['image'][1]:.2f} to {means['image'][0]:.2f}] |" in field_table(table)
    assert field_table(table).count("[") == 2


def test_hard_questions_are_those_that_pooling_gets_wrong_and_full_context_right() -> None:
    """Counted question by question; another budget has other hard questions, a figure that is no right or wrong has none."""
    rng = random.Random(3)
    scores = {
        key: [100.0 * (rng.random() < share) for _ in range(60)]
        for key, share in ((("full", None), 0.9), (("downsample", 0.4), 0.7), (("downsample", 0.1), 0.3),
                           (("random", 0.4), 0.5), (("random", 0.1), 0.4))
    }  # fmt: skip
    scenes = "easy_vqa_scenes"

    def row(key: tuple[str, float | None], values: list[float]) -> tuple[Any, ...]:
        made = Figure("accuracy", mean(values), 60, [], values)
        return Subject(key[0], key[1], key[0]), scenes, [made], {"equivalent_tokens": 9}

    table = make_table([row(key, values) for key, values in scores.items()])
    for keep in (0.4, 0.1):
        hard = [
            place
            for place in range(60)
            if scores["full", None][place] and not scores["downsample", keep][place]
        ]
        rows = table[table["keep"] == keep].set_index("policy")
        ours = mean([scores["random", keep][place] for place in hard])
        assert (rows["hard_n"] == len(hard)).all() and rows.loc["downsample", "hard"] == 0
        assert rows.loc["random", "hard"] == pytest.approx(ours)
        assert rows.loc["random", "hard_low"] < ours < rows.loc["random", "hard_high"]
        assert f"easy_vqa_scenes {ours:.1f} (" in field_table(table)
    assert table.loc[table["policy"] == "full", "hard_n"].isna().all()
    half = {**scores, ("full", None): [50.0] * 60}
    assert make_table([row(key, values) for key, values in half.items()])["hard_n"].isna().all()


def test_the_picture_names_each_line_once_and_no_policy_without_a_saving() -> None:
    """`image_text` has `image`'s figures, H2O all image tokens; shares are no ranks once there are tokens."""
    rows = [
        (name, 0.2, None, value, tokens)
        for name, value, tokens in (
            ("full", 90, 64), ("image", 70, 30), ("image_text", 70, 30), ("h2o", 90, 64), ("fastv", 89, 50),
            ("random", 20, 30),
        )
    ] + [("random", None, 30, 60, 30), ("image_text", None, 30, 70, 30), ("image", None, 30, 70, 30)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["policy", "keep", "tokens", "value", "equivalent_tokens"])
    table = table.assign(benchmark="easy_vqa_scenes", metric="accuracy", percent=table["value"] / 0.9)
    assert highlighted(table) == ["image", "random"]
    assert highlighted(table[table["tokens"].isna()]) == ["image", "fastv", "random"]


def test_published_figures_have_a_source_and_stand_apart():
    claims = published("llava", [192, 128, 64], 576)
    assert list(claims.columns) == list(COLUMNS) and not claims.isna().any().any()
    assert claims["link"].str.match(r"https://(arxiv.org/abs/|github.com/)").all()
    assert not claims.duplicated(["method", "source", "tokens", "benchmark"]).any()
    assert claims["value"].between(50, 110).all()
    ours = claims[(claims["method"] == "Dynamic-LLaVA_I|T") & (claims["benchmark"] == "mean")]
    assert ours["value"].item() == pytest.approx(99.2, abs=0.05)  # of the paper's eleven sets
    text = claims_table(claims, ["GQA", "mean"])
    assert "| VisionZip | 64 | 93.2 | 89.0 | MMTok, table 16" in text and text.index("| 192 |") < text.index(
        "| 64 |"
    )
    assert published("llava", [64], 64).empty  # `tiny` has no more
    assert set(published("qwen2_5_vl", [64], 300)["tokens"]) == {"10%"}
    assert published("internvl", [64], 64).empty and claims_table(published("internvl", [], 64), []) == ""


def compared(output: Path, *flags: str) -> list[str]:
    given = ["--device", "cpu", "--limit", "4", "--batch-size", "2", "--output", str(output)]
    return ["compare", *given, *flags]


def test_command_measures_reports_and_adds_rows(
    easy_vqa_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = compared(tmp_path, "--pretrained", "tiny", "--keep", "0.25", "--repeats", "1")
    flags += ["--tasks", "easy_vqa_scenes", "easy_vqa_describe"]
    assert main([*flags, "--policies", "full", "fastv"]) == 0
    assert main([*flags, "--policies", "h2o", "--hard"]) == 0
    said = capsys.readouterr().out
    assert "| fastv | 25% |" in said and "[1/4] h2o at 25%: easy_vqa_scenes" in said
    table = pd.read_csv(tmp_path / "table.csv")  # what was measured before is still in it
    scenes = table[table["benchmark"] == "easy_vqa_scenes"].set_index("policy")
    tokens = {"full": 64, "h2o": 64, "fastv": (3 * 64 + 3 * 16) / 6, "downsample": 16}
    assert scenes["equivalent_tokens"].to_dict() == tokens
    hard = scenes.drop("full")["hard_n"]
    assert (hard == hard["fastv"]).all() and 0 < hard["fastv"] <= 4 and scenes.loc["downsample", "hard"] == 0
    assert (scenes["prefill_ms"] > 0).all() and (scenes["n"] == 4).all()
    assert scenes.loc["fastv", "prefill_gflops"] < scenes.loc["full", "prefill_gflops"]
    long = table[table["metric"] == "ppl"].set_index("policy")
    assert (
        long.loc["h2o", "cache_kib"] < long.loc["full", "cache_kib"] and (long["low"] <= long["value"]).all()
    )
    assert set(table.loc[table["benchmark"] == "mean", "policy"]) == set(tokens)
    assert (tmp_path / "picture.png").is_file() and (tmp_path / "policies.png").is_file()
    assert (tmp_path / "table.md").read_text() in said


def test_several_checkpoints_answer_under_the_learned_policies(
    easy_vqa_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `make policies` types it; a comparison of one checkpoint finds its figures there again."""
    checkpoints = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, processor = load_model("tiny")
        checkpoints.append(str(tmp_path / f"seed{seed}"))
        for part in (model, processor):
            part.save_pretrained(checkpoints[-1])
    flags = ["--repeats", "0", "--policies", "full", "image", "random", "--tasks", "easy_vqa_hard"]
    flags = compared(tmp_path / "out", *flags, "--tokens", "40", "--pretrained")
    assert main([*flags, *checkpoints]) == 0
    said = capsys.readouterr().out
    assert said.count("image at 40 tokens: ") == 2 and said.count("random at 40 tokens: ") == 1
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("policy")
    assert table["trainings"].to_dict() == {"full": 2, "image": 2, "random": 1}
    values = []
    for checkpoint in checkpoints:
        assert main([*flags, checkpoint]) == 0
        values.append(pd.read_csv(tmp_path / "out" / "table.csv").set_index("policy").loc["image", "value"])
    assert "random at 40 tokens: " in capsys.readouterr().out  # the second checkpoint's, and nothing else
    assert table.loc["image", "value"] == pytest.approx(mean(values))
    for wrong, problem in (
        ([checkpoints[0], checkpoints[0]], "seed0 is there twice"),
        ([*checkpoints, "tiny"], "tiny: image: needs predictors"),
        ([*checkpoints, "--policies", "full", "random"], "--policies names none"),
    ):
        assert main([*flags, *wrong]) == 2
        said = capsys.readouterr()
        assert problem in said.err and "[1/" not in said.out


def test_an_interrupted_comparison_goes_on_to_the_same_table(
    easy_vqa_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        "--pretrained",
        "tiny",
        "--repeats",
        "0",
        "--tokens",
        "64",
        "40",
        "--policies",
        "full",
        "random",
        "dart",
    ]
    written = 0

    def cut_off(journal: Journal, entries) -> None:
        nonlocal written
        if written == 5:  # of two batches a policy: in the middle of the third
            raise KeyboardInterrupt
        written += 1
        write(journal, entries)

    write = Journal.write
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", cut_off)
        assert main(compared(tmp_path / "cut", *flags)) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "table.csv").exists()
    answered = 0

    def count(journal: Journal, entries) -> None:
        nonlocal answered
        entries = list(entries)
        answered += len(entries)
        write(journal, entries)

    monkeypatch.setattr(Journal, "write", count)
    assert main(compared(tmp_path / "cut", *flags)) == 0
    assert answered == 5 * 4 - 5 * 2
    assert main(compared(tmp_path / "whole", *flags)) == 0
    names = ("table.csv", "table.md")
    cut, whole = ([(tmp_path / run / name).read_text() for name in names] for run in ("cut", "whole"))
    assert cut == whole and "random,,easy_vqa_scenes" in whole[0] and ",40.0," in whole[0]
    assert not list((tmp_path / "cut").rglob("journal-*"))


def large_images(family: str, folder: Path) -> str:
    """A tiny random checkpoint with LLaVA-1.5's 576 image tokens, or a Qwen2.5-VL with 256 of each image."""
    if family == "llava":
        source = ROOT / "dynllava_plugin" / "assets" / "tiny_llava"
        config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
        config.image_seq_length, config.vision_config.image_size = 576, 384
        processor.image_processor.size = processor.image_processor.crop_size = {"height": 384, "width": 384}
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    else:
        processor = AutoProcessor.from_pretrained(write_checkpoint(family, folder))
        processor.image_processor.size = {"shortest_edge": 224**2, "longest_edge": 224**2}
    processor.save_pretrained(folder)
    return str(folder)


def die(flags: list[str], owner: type, count: int) -> None:
    """Run the command until `owner` has written `count` times; then leave half a line, as a write that was cut, and be gone."""
    write, written = owner.write, 0  # type: ignore[attr-defined]

    def last(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        write(self, *args, **kwargs)
        written += 1
        if written == count:
            if owner is Journal:
                self._file.write('{"key": "0')
                self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    owner.write = last  # type: ignore[attr-defined]
    main(flags)
    os._exit(0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_comparison_that_is_killed_goes_on_to_the_same_table(
    family: str, easy_vqa_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 192, 128 and 64 tokens; SIGKILL behind the fifth run, and again inside of the seventh."""
    torch.set_num_threads(1)  # or a forked process hangs
    flags = ["--pretrained", large_images(family, tmp_path / family), "--repeats", "0"]
    flags += ["--tasks", "easy_vqa_scenes", "easy_vqa_hard", "--tokens", "192", "128", "64"]
    flags += ["--policies", "full", "divprune"]
    context = multiprocessing.get_context("fork")
    for owner, count in ((Store, 5), (Journal, 3)):  # of two batches a run
        process = context.Process(target=die, args=(compared(tmp_path / "cut", *flags), owner, count))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    measured = [path for path in (tmp_path / "cut" / "runs").glob("*/*.json")]
    assert len(measured) == 6 and not (tmp_path / "cut" / "table.csv").exists()
    answered: list[int] = []
    write = Journal.write

    def count_them(journal: Journal, entries: Any) -> None:
        entries = list(entries)
        answered.append(len(entries))
        write(journal, entries)

    monkeypatch.setattr(Journal, "write", count_them)
    assert main(compared(tmp_path / "cut", *flags)) == 0
    assert sum(answered) == 2 + 4  # of the seventh run one batch is left, and the eighth
    assert main(compared(tmp_path / "whole", *flags)) == 0
    for name in ("table.csv", "table.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    table = pd.read_csv(tmp_path / "whole" / "table.csv")
    pruned = table[(table["policy"] == "divprune") & (table["benchmark"] == "easy_vqa_hard")]
    assert pruned["equivalent_tokens"].tolist() == pruned["tokens"].tolist() == [192, 128, 64]


def test_several_processes_share_the_questions(easy_vqa_data: Path, tmp_path: Path) -> None:
    """By lmms-eval's own launcher, as `dynllava compare --help` says."""
    flags = compared(
        tmp_path, "--pretrained", "tiny", "--repeats", "0", "--keep", "0.25", "--policies", "full", "random"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    subprocess.run(
        [*launch, "-m", "dynllava_plugin.cli", *flags],
        check=True,
        env=environment,
        capture_output=True,
        timeout=240,
    )
    several = pd.read_csv(tmp_path / "table.csv")
    assert main([*flags, "--fresh"]) == 0
    pd.testing.assert_frame_equal(several, pd.read_csv(tmp_path / "table.csv"))
    assert (several["n"] == 4).all()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--limit", "0"], "--limit: 0 is not positive"),
        (["--repeats", "-1"], "--repeats: -1 is negative"),
        (["--pretrained", "no/such/folder"], "no/such/folder"),
        (["--policies", "fast"], "policy: unknown value 'fast'"),
        (["--keep", "2"], "--keep: 2 is outside"),
        (["--tasks", "no_such_task"], "no_such_task: no such benchmark"),
        (["--tasks", "GQA", "MME", "--limit", "3"], "--limit: 3 cuts one of MME's pairs"),
        (["--tasks", "MM-Vet"], "--tasks: nothing is left to compare"),
        (["--suite", "no_such_suite"], "no_such_suite: no such suite"),
        (["--output", "/proc/compare"], "--output /proc/compare: can't be written"),
        (["--output", f"{__file__}/compare"], "/compare: can't be written (Not a directory)"),
        (["--policies", "full", "fastv", "--tokens", "16"], "the nearest is 32.5"),
    ],
)
def test_what_is_wrong_is_one_line(flags, problem, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and problem in error


def test_images_of_several_sizes_are_tried_before_anything_is_asked(
    easy_vqa_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that a family can't run, and a budget out of reach of its images: refused by name, else listed."""
    checkpoint = str(write_checkpoint("qwen2_5_vl", tmp_path / "qwen"))
    flags = ["--pretrained", checkpoint, "--repeats", "0", "--tokens", "32"]
    for policy, problem in (("random", "the nearest is 32.5"), ("visionzip", "needs the class token")):
        assert main(compared(tmp_path / "out", *flags, "--policies", "full", policy)) == 2
        said = capsys.readouterr()
        assert problem in said.err and "[1/" not in said.out
    assert main(compared(tmp_path / "out", *flags, "--policies", "all", "--limit", "1")) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| divprune | 32 tokens |" in text and "not measured, " in text
    for policy in ("random", "visionzip", "image_text"):
        assert f"{policy} at 32 tokens" in text.partition("not measured")[2]
