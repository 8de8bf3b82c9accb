"""Tables keep apart what differs: checkpoints of one name, data types, prompts, seeds, policies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dynllava_plugin.cli import main
from dynllava_plugin.evaluation.results.paper import compare, render_comparison
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.results.tables import by_benchmark, pivot, render, setting_counts, span
from tests.test_paper import row, write_kit, write_run

GQA = {"gqa": {"exact_match,none": 0.5}}
COUNTS = {
    "n": 8,
    "image_tokens": 576.0,
    "kept_image_tokens": 115.0,
    "equivalent_tokens": 143.8,
    "prefill_gflops": 2500.0,
}


def write(folder: Path, accuracy: float = 0.5, questions: int = 8, **manifest: Any) -> None:
    write_run(folder, "image_text", {"gqa": {"exact_match,none": accuracy}}, **manifest)
    path = folder / "20260101_000000_results.json"
    content = json.loads(path.read_text())
    content["n-samples"]["gqa"]["effective"] = questions
    path.write_text(json.dumps(content))


def test_an_older_checkpoint_of_the_same_name_is_another_row(tmp_path: Path) -> None:
    write(tmp_path / "old", 0.9, questions=100, checkpoint_hash="aaa")
    write(tmp_path / "new", 0.5, checkpoint_hash="bbb")
    wide = pivot(read_results(tmp_path))["GQA accuracy [%] lmms-eval"]
    assert dict(wide) == {
        ("org/Dynamic-LLaVA-7B (aaa)", "image_text"): "90.00",
        ("org/Dynamic-LLaVA-7B (bbb)", "image_text"): "50.00",
    }
    assert set(compare(read_results(tmp_path))["paper_method"]) == {"Dynamic-LLaVA_I|T 7B"}


@pytest.mark.parametrize(
    ("changes", "modes"),
    [
        ([{"model": {"dtype": name}} for name in ("float32", "bfloat16")], {"image_text, float32", "image_text, bfloat16"}),
        ([{"settings": {"checkpoint": "m", "attn_implementation": name}} for name in ("sdpa", "eager")],
         {"image_text, sdpa", "image_text, eager"}),
        ([{"sparsity": {"mode": "image", "image_policy": "random", "random_seed": seed}} for seed in (0, 1)],
         {"random_image, seed 0", "random_image, seed 1"}),
        ([{"sparsity": {"mode": "image_text", "random_seed": seed}} for seed in (0, 1)], {"image_text"}),
    ],
)  # fmt: skip
def test_settings_are_shown_where_they_differ(tmp_path: Path, changes: list[dict], modes: set[str]) -> None:
    for number, change in enumerate(changes):
        write(tmp_path / str(number), **{"settings": {"checkpoint": "m"}, **change})
    table = read_results(tmp_path)
    assert {mode for _, mode in pivot(table).index} == modes
    assert set(by_benchmark(table).columns) == {*(f"{mode} lmms-eval" for mode in modes), "n lmms-eval"}
    assert len(set(table["mode"])) == 1  # the tidy table has a column for each


def test_prompts_are_told_apart(tmp_path: Path) -> None:
    for prompts in ("llava", "kit"):
        write_kit(tmp_path / prompts, "image", {"POPE": {"metrics": {"Overall": 80.0}}}, prompts=prompts)
    assert {mode for _, mode in pivot(read_results(tmp_path)).index} == {
        "image, llava prompts",
        "image, kit prompts",
    }


@pytest.mark.parametrize(
    ("policy", "arguments", "rate", "seed"),
    [
        ("fastv", {"k": 3, "r": 0.75}, None, None),
        ("fastv", {"k": 3}, 0.2, None),
        ("random", {"keep": 0.1}, None, 7),
        ("random", {"seed": 3}, 0.2, None),
    ],
)
def test_a_policys_row_names_it_and_no_learned_settings(
    tmp_path: Path, policy: str, arguments: dict[str, Any], rate: float | None, seed: float | None
) -> None:
    sparsity = {
        "mode": "image_text",
        "image_policy": "learned",
        "vision_keep_rate": 0.2,
        "text_keep_rate": 0.5,
    }
    write(tmp_path, sparsity={**sparsity, "random_seed": 7, "policy": policy, "policy_args": arguments})
    found = read_results(tmp_path).iloc[0]
    name = ",".join([policy, *(f"{key}={value}" for key, value in arguments.items())])
    assert found["policy"] == found["mode"] == name
    assert pd.isna(found["image_policy"]) and pd.isna(found["text_keep_rate"])
    for column, wanted in (("vision_keep_rate", rate), ("random_seed", seed)):
        assert found[column] == wanted if wanted is not None else pd.isna(found[column])


SPARSITY = {"image_policy": "learned", "vision_keep_rate": 0.2, "text_keep_rate": 0.5, "random_seed": 0}


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("full", {}),
        ("image", {"vision_keep_rate": 0.2, "image_policy": "learned"}),
        ("image_text", {"vision_keep_rate": 0.2, "image_policy": "learned", "text_keep_rate": 0.5}),
    ],
)
def test_settings_that_do_not_apply_are_empty(tmp_path: Path, mode: str, settings: dict[str, Any]) -> None:
    write(tmp_path, sparsity={"mode": mode, **SPARSITY})
    found = read_results(tmp_path).iloc[0]
    assert {name: found[name] for name in SPARSITY if pd.notna(found[name])} == settings


def test_runs_of_full_context_differ_in_no_keep_rate_and_other_modes_still_do(tmp_path: Path) -> None:
    for mode in ("full", "image"):
        for rate in (0.1, 0.2):
            sparsity = {**SPARSITY, "mode": mode, "vision_keep_rate": rate}
            write(tmp_path / f"{mode}{rate}", sparsity=sparsity)
    assert list(read_results(tmp_path)["mode"]) == ["full", "image", "image@10%"]


def test_a_policy_without_a_manifest_is_read_from_its_arguments(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "20260101_000000_dynllava_run.json").unlink()
    path = tmp_path / "20260101_000000_results.json"
    content = json.loads(path.read_text())
    content["config"] = {"model_args": "pretrained=a/m,policy=fastv,k=3,r=0.75,dtype=bfloat16"}
    path.write_text(json.dumps(content))
    found = read_results(tmp_path).iloc[0]
    assert (found["checkpoint"], found["mode"]) == ("m", "fastv,k=3,r=0.75")


def test_counts_are_printed_with_every_table(tmp_path: Path) -> None:
    """Equivalent tokens and prefill FLOPs; of five benchmarks as a table of their own. Questions of each harness."""
    tasks = {
        "gqa": "exact_match",
        "pope": "pope_f1_score",
        "realworldqa": "exact_match",
        "mmvp": "mmvp_pair_accuracy",
    }
    scores = {task: {f"{key},none": 0.5} for task, key in tasks.items()}
    more = {**COUNTS, "prefill_gflops": 2600.0}
    write_run(tmp_path / "a", "image", scores, tokens={**dict.fromkeys(tasks, COUNTS), "pope": more})
    write_kit(tmp_path / "b", "image", {"MMBench_DEV_EN": {"metrics": {"Overall": 0.5}}})
    path = tmp_path / "b" / "dynllava_run.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokens": {"MMBench_DEV_EN": {**COUNTS, "n": 32}}})
    )
    write_run(
        tmp_path / "c",
        "image",
        {"mmbench_en_dev_static": {"gpt_eval_score,none": 50.0}},
        tokens={"mmbench_en_dev_static": COUNTS},
    )
    table = read_results(tmp_path)
    text = render(table, "markdown")
    assert "| MMBench | accuracy [%] | 50.00 | 50.00 | 8 | 32 |" in text
    assert "| checkpoint | mode | image tokens kept | equivalent tokens | prefill GFLOPs |" in text
    assert "| 115 of 576 | 143.8 | 2500 to 2600 |" in text
    assert render(table, "latex").count(r"\begin{tabular}") == 2
    comparison = compare(table)
    mmbench = row(comparison, benchmark="MMBench")
    assert (mmbench["n lmms-eval"], mmbench["n vlmevalkit"]) == (8, 32)
    line = (
        "Of every figure: image tokens kept 115 of 576, equivalent tokens 143.8, prefill GFLOPs 2500 to 2600."
    )
    assert line in render_comparison(comparison, "markdown") and f"% {line}" in render_comparison(
        comparison, "latex"
    )
    assert span(pd.Series([], dtype=float)) == "-"


def test_runs_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "long", 0.5, questions=6)
    whole = read_results(tmp_path)
    assert "left out" not in render(whole, "markdown")
    write(tmp_path / "short", 0.25, questions=3)
    line = (
        "\n* left out, an older or smaller run of org/Dynamic-LLaVA-7B, image_text, lmms-eval, GQA: n = 3\n"
    )
    table = read_results(tmp_path)
    assert line in render(table, "markdown") and "| 50.00 | 6 |" in render(table, "markdown")
    assert not any("left out" in render(table, style) for style in ("csv", "latex"))
    assert len(render(table, "csv").splitlines()) == 3
    assert main(["table", str(tmp_path), "--compare-paper"]) == 0
    assert line in capsys.readouterr().out


def test_a_run_of_nobody_knows_how_many_questions_hides_none(tmp_path: Path) -> None:
    write(tmp_path / "known", 0.5, questions=6)
    write(tmp_path / "unknown", 0.25)
    path = tmp_path / "unknown" / "20260101_000000_results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n-samples": {}}))
    text = render(read_results(tmp_path), "markdown")
    assert "| 50.00 | 6 |" in text and "lmms-eval, GQA: n = unknown\n" in text


def write_lmms_eval(folder: Path, date: str, value: float, **command: object) -> None:
    """What lmms-eval wrote, with other arguments of generation."""
    folder.mkdir(parents=True, exist_ok=True)
    (source,) = (Path(__file__).parent / "harness_files" / "lmms_eval_judged").glob("*_results.json")
    content = json.loads(source.read_text())
    content["results"]["mmvet"]["gpt_eval_score,none"] = value
    content["config"]["gen_kwargs"] = command.pop("gen_kwargs", None)
    content["config"]["resolved_cli_args"].update(command)
    (folder / f"{date}_results.json").write_text(json.dumps(content))
    run = source.with_name(source.name.replace("results", "dynllava_run")).read_text()
    (folder / f"{date}_dynllava_run.json").write_text(run)


def test_what_changes_an_answer_is_part_of_a_run_s_identity(tmp_path: Path) -> None:
    """Each a run of its own in the table, whichever came last."""
    commands: list[dict[str, object]] = [
        {"gen_kwargs": {"temperature": 0.7, "do_sample": True}},
        {"gen_kwargs": {"max_new_tokens": 8}},
        {"offset": 4},
        {"num_fewshot": 2},
        {"system_instruction": "Be brief."},
        {"apply_chat_template": True},
        {},
    ]
    for number, command in enumerate(commands):
        write_lmms_eval(tmp_path, f"2026010{number + 1}_000000", 10.0 + number, **command)
    write_lmms_eval(tmp_path, "20260109_000000", 90.0, offset=4)  # once more: the later one stands
    rows = read_results(tmp_path)
    rows = rows[rows["benchmark"] == "MM-Vet"]
    assert sorted(rows["value"]) == [10, 11, 13, 14, 15, 16, 90]
    cells = pivot(read_results(tmp_path))["MM-Vet score [%] lmms-eval"]
    assert sorted(map(float, cells)) == [10, 11, 13, 14, 15, 16, 90]
    assert cells["tiny", "image_text, do_sample=True, seed=1234, temperature=0.7"] == "10.00"
    assert cells["tiny", "image_text, offset=4"] == "90.00" and cells["tiny", "image_text"] == "16.00"


def test_the_kit_s_limit_of_new_tokens_is_part_of_it_too(tmp_path: Path) -> None:
    source = Path(__file__).parent / "harness_files" / "vlmevalkit_judged"
    for limit in (8, 1024):
        shutil.copytree(source, tmp_path / str(limit))
        path = tmp_path / str(limit) / "dynllava_run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": limit}))
    assert {mode for _, mode in pivot(read_results(tmp_path)).index} == {
        "image_text",
        "image_text, max_new_tokens=8",
    }


def test_counts_leave_out_rows_without_an_image_and_short_answers() -> None:
    """What stays of an answer of fewer than 20 tokens says nothing, and a text-only benchmark has no image tokens."""
    columns = [
        "image_tokens",
        "kept_image_tokens",
        "generated_tokens",
        "kept_output_share",
        "equivalent_tokens",
    ]
    rows = [(576, 115, 19, 0.1, 144), (576, 115, 20, 0.6, 144), (0, 0, 300, 0.4, 0)]
    table = pd.DataFrame(rows, columns=columns).assign(checkpoint="c", mode="m", prefill_gflops=2.5)
    assert setting_counts(table, "c", "m") == {
        "image tokens kept": "115 of 576", "equivalent tokens": "144", "prefill GFLOPs": "2.5",
        "output tokens kept [%]": "40.0 to 60.0",
    }  # fmt: skip
