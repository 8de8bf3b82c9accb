"""`dynllava compare`: intervals, costs, the table, and the command on a few questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.cli import main
from dynllava_plugin.compare import answers, command
from dynllava_plugin.compare.answers import Figure, task_names
from dynllava_plugin.compare.bootstrap import interval, resampled_means
from dynllava_plugin.compare.costs import cache_bytes
from dynllava_plugin.compare.report import draw, make_table, to_markdown
from dynllava_plugin.compare.subjects import DEFAULT_POLICIES, Subject, subjects
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.prefill_costs import context_of
from dynllava_plugin.policies import policy_of
from dynllava_plugin.sparsity.config import SparsityConfig
from tests.property_tests import examples
from tests.tiny_random import TOKENS_PER_IMAGE, batch_of, random_model, random_sample

SETTINGS = SparsityConfig()


@examples(20)
@given(seed=st.integers(0, 999), questions=st.integers(5, 60), policies=st.integers(1, 4))
def test_bootstrap_draws_questions(seed, questions, policies):
    """Against drawing question numbers by hand; the same draw serves every policy."""
    scores = np.random.default_rng(seed).random((policies, questions))
    means = resampled_means(scores, resamples=400)
    again = resampled_means(scores[:1], resamples=400)
    assert np.allclose(means[0], again[0])  # a policy's interval doesn't depend on its company
    rng = np.random.default_rng(seed + 1)
    by_hand = np.array([scores[0, rng.integers(0, questions, questions)].mean() for _ in range(400)])
    spread = scores[0].std() / questions**0.5
    assert abs(means[0].mean() - scores[0].mean()) < 4 * spread / 20 + 1e-9
    assert abs(means[0].std() - by_hand.std()) < 0.35 * spread + 1e-9
    low, high = interval(means[0])
    assert low <= scores[0].mean() <= high


def test_paired_differences_are_narrower_than_single_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(300) < 0.5
    first = hard.astype(float)
    second = first.copy()
    second[:6] = 1 - second[:6]
    means = resampled_means(np.array([first, second]))
    single = np.subtract(*interval(means[0])[::-1])
    paired = np.subtract(*interval(means[0] - means[1])[::-1])
    assert paired < single / 3
    assert interval(means[0] - means[0]) == (0.0, 0.0)


def test_subjects_are_policies_at_shares():
    found = subjects(
        ["full", "fastv,k=2", "fastv,r=0.5", "h2o", "fastv+h2o", "structure"], [0.4, 0.2], SETTINGS, 6
    )
    assert [(s.policy, s.keep) for s in found] == [
        ("full", None), ("fastv,k=2,keep=0.4", 0.4), ("fastv,k=2,keep=0.2", 0.2), ("fastv,r=0.5", None),
        ("h2o,r=0.4", 0.4), ("h2o,r=0.2", 0.2), ("fastv+h2o,keep=0.4", 0.4), ("fastv+h2o,keep=0.2", 0.2),
        ("structure", None),
    ]  # fmt: skip
    assert found[1].of(SETTINGS).kept_tokens(64) == 25
    everything = subjects(DEFAULT_POLICIES, [0.4, 0.2, 0.1], SETTINGS, 6)
    assert len(everything) == 1 + 3 * (len(DEFAULT_POLICIES) - 1) + 1  # PruMerge+ by its own rule as well
    assert [s.policy for s in everything if s.keep is None] == ["full", "prumerge+"]
    shipped = {
        "full",
        "image",
        "image_text",
        "fastv",
        "h2o",
        "fastv+h2o",
        "random",
        "downsample",
        "visionzip",
    }
    assert {*shipped, "divprune", "cdpruner", "prumerge+"} <= set(DEFAULT_POLICIES)
    assert not {"text", "random_text", "structure"} & set(DEFAULT_POLICIES)  # output text alone


@pytest.mark.parametrize(
    ("policies", "keep", "problem"),
    [
        (["fast"], 0.2, "policy: unknown value 'fast'"),
        (["full", "full"], 0.2, "--policies: full is named twice"),
        (["full"], 0.0, r"--keep: 0\.0 is outside \(0, 1\]"),
        (["fastv,k=8"], 0.2, "fastv: layer 8 is outside the model"),
    ],
)
def test_wrong_subjects_are_named(policies, keep, problem):
    with pytest.raises(UserError, match=problem):
        subjects(policies, [keep], SETTINGS, 6)


def test_tasks_by_either_name():
    assert task_names(["easy_vqa_describe", "gqa", "POPE", "easy_vqa_describe_ppl"]) == [
        "easy_vqa_describe_ppl", "easy_vqa_describe_answer", "gqa", "pope",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--tasks: lmms-eval has no task 'no_such_task'"):
        known, answers._tasks_known = answers._tasks_known, lambda all_of_them: known(False)
        try:
            answers.Harness(["no_such_task"], 1)
        finally:
            answers._tasks_known = known


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


def test_cache_bytes_counts_what_is_held():
    import random

    model = random_model()
    rng = random.Random(0)
    samples = [random_sample(rng, 1, 3), random_sample(rng, 1, 6)]
    batch = batch_of(samples)
    answer = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model.set_sparsity(policy="full")
    token = 2 * 2 * 8 * 4  # key and value, heads, width, bytes
    tokens = sum(len(sample.ids) for sample in samples) + 6
    assert cache_bytes(model, batch, answer, mask) == 5 * tokens * token / 2
    model.set_sparsity(policy="fastv,k=2,r=0.75")
    dropped = 2 * (TOKENS_PER_IMAGE - 4)
    assert cache_bytes(model, batch, answer, mask) == (5 * tokens - 3 * dropped) * token / 2
    model.set_sparsity(policy="h2o,r=0.5")
    lengths = [len(samples[0].ids) + 4, len(samples[1].ids) + 2]
    held = sum(length // 2 for length in lengths)
    assert cache_bytes(model, batch, answer, mask) == (2 * tokens * token + 3 * held * (token + 2 * 8)) / 2


def figure(benchmark: str, metric: str, scores: list[float]) -> Figure:
    value = sum(scores) / len(scores)
    counts = {"image_tokens": 64, "kept_image_tokens": 12}
    return Figure(benchmark, metric, value, list(range(len(scores))), scores, counts)


def make(measured):
    return make_table(
        [
            (Subject(name, keep, name), figures, {figures[0].benchmark: costs})
            for name, keep, figures, costs in measured
        ]
    )


def test_table_and_plots(tmp_path: Path):
    rng = np.random.default_rng(0)
    full = (100 * (rng.random(200) < 0.9)).tolist()
    worse = [100.0 * (score > 0 and index % 5 > 0) for index, score in enumerate(full)]
    ppl = (1 + rng.random(30)).tolist()
    table = make(
        [
            (
                "fastv",
                0.2,
                [figure("easy_vqa_scenes", "accuracy", worse)],
                {"equivalent_tokens": 30, "prefill_ms": 4},
            ),
            (
                "full",
                None,
                [figure("easy_vqa_scenes", "accuracy", full)],
                {"equivalent_tokens": 64, "prefill_ms": 5},
            ),
            ("full", None, [figure("easy_vqa_describe", "ppl", ppl)], {"cache_kib": 10}),
            ("h2o", 0.5, [figure("easy_vqa_describe", "ppl", [2 * p for p in ppl])], {"cache_kib": 6}),
            ("other", None, [Figure("POPE", "f1", 80.0)], {}),
        ]
    )
    rows = {(row.policy, row.benchmark): row for row in table.itertuples()}
    pruned, whole = rows["fastv", "easy_vqa_scenes"], rows["full", "easy_vqa_scenes"]
    assert pruned.behind_full == pytest.approx(whole.value - pruned.value) and pruned.n == 200
    assert 0 < pruned.behind_low < pruned.behind_full < pruned.behind_high
    assert (whole.behind_full, whole.behind_low, whole.behind_high) == (0, 0, 0)
    assert whole.low < whole.value < whole.high
    assert rows["h2o", "easy_vqa_describe"].behind_full > 0  # less is better: it is behind
    assert pd.isna(rows["other", "POPE"].low)
    required = ["policy", "keep", "benchmark", "metric", "value", "n", "equivalent_tokens", "prefill_ms"]
    assert list(table.columns[: len(required)]) == required
    text = to_markdown(table)
    assert "| fastv | 20% |" in text and "cache KiB" in text and "### POPE, f1" in text
    assert text.index("| full |") < text.index("| h2o |")
    for benchmark, metric in (("easy_vqa_scenes", "accuracy"), ("easy_vqa_describe", "ppl"), ("POPE", "f1")):
        draw(table, benchmark, metric, tmp_path / f"{benchmark}.png")
        assert (tmp_path / f"{benchmark}.png").stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 3


def test_command_measures_reports_and_resumes(
    easy_vqa_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "compare",
        "--pretrained",
        "tiny",
        "--device",
        "cpu",
        "--keep",
        "0.25",
        "--limit",
        "4",
        "--repeats",
        "1",
    ]
    flags += ["--tasks", "easy_vqa_scenes", "easy_vqa_describe_ppl", "--output", str(tmp_path)]
    torch.manual_seed(0)
    assert main([*flags, "--policies", "full", "fastv", "h2o"]) == 0
    assert "| fastv | 25% |" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "table.csv")
    assert sorted(set(table["policy"])) == ["fastv", "full", "h2o"] and len(table) == 6
    scenes = table[table["benchmark"] == "easy_vqa_scenes"].set_index("policy")
    assert scenes["equivalent_tokens"].to_dict() == {"full": 64, "h2o": 64, "fastv": (3 * 64 + 3 * 16) / 6}
    assert (scenes["prefill_ms"] > 0).all() and (scenes["n"] == 4).all()
    assert scenes.loc["fastv", "prefill_gflops"] < scenes.loc["full", "prefill_gflops"]
    long = table[table["metric"] == "ppl"].set_index("policy")
    assert long.loc["h2o", "cache_kib"] < long.loc["full", "cache_kib"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "easy_vqa_scenes_accuracy.png", "easy_vqa_describe_ppl.png",
    }  # fmt: skip

    def not_again(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(answers.Harness, "figures", not_again)
    monkeypatch.setattr(command, "_fingerprint", lambda engine, settings: _checkpoint(tmp_path))
    assert main([*flags, "--policies", "h2o", "--repeats", "0"]) == 0
    assert len(pd.read_csv(tmp_path / "table.csv")) == 6  # what was measured before is still in it


def _checkpoint(folder: Path) -> str:
    """The bundled model's predictors are fresh in every process: another checkpoint, but for this."""
    import json

    return json.loads(next(folder.glob("runs/*/full*.json")).read_text())["made_from"]["checkpoint"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--limit", "0"], "--limit: 0 is not positive"),
        (["--repeats", "-1"], "--repeats: -1 is negative"),
        (["--pretrained", "no/such/folder"], "no/such/folder"),
        (["--policies", "fast"], "policy: unknown value 'fast'"),
        (["--keep", "2"], "--keep: 2.0 is outside"),
    ],
)
def test_what_is_wrong_is_one_line(flags, problem, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and problem in error
