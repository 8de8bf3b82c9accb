"""One pandas table over both harnesses' output folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, PERCENT, find_metrics, unit_of
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.policies.registry import arguments_of, describe, parse_policy

LMMS_EVAL, VLMEVALKIT = "lmms-eval", "vlmevalkit"
MANIFEST_NAME = "dynllava_run.json"
_COUNT_COLUMNS = ("image tokens kept", "output tokens kept [%]", "equivalent tokens", "prefill GFLOPs")
_MODE_ORDER = ("full", "image", "image_text", "random")
COUNTS = (
    "image_tokens",
    "kept_image_tokens",
    "generated_tokens",
    "kept_tokens",
    "kept_output_share",
    "equivalent_tokens",
    "prefill_gflops",
)
SETTINGS = ("vision_keep_rate", "image_policy")
KEYS = ("checkpoint", "mode", "harness", "benchmark", "metric")
COLUMNS = (*KEYS, "value", "n", *SETTINGS, *COUNTS, "seconds", "file")


def read_results(folder: Path) -> pd.DataFrame:
    """Every figure under `folder`, one a row.

    Parameters
    ----------
    folder : Path
        Searched recursively for lmms-eval's ``*_results.json`` and VLMEvalKit's ``status.json``; settings and
        token counts come from the ``dynllava_run.json`` beside them.

    Returns
    -------
    DataFrame
        Columns `COLUMNS`: `value` in percent (perplexity as it is), `n` questions, token counts as means over
        samples, NaN where not measured. Of two runs with the same settings and `n` the later one stands.

    Raises
    ------
    UserError
        For a folder that doesn't exist or holds no results, or a file that can't be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = [*folder.rglob("[0-9]*_results.json"), *folder.rglob("status.json")]
    rows: list[dict[str, Any]] = []
    for path in sorted(files, key=lambda file: file.stat().st_mtime):
        rows += _lmms_eval_rows(path) if path.name != "status.json" else _vlmevalkit_rows(path)
    if not rows:
        raise UserError(f"{folder}: no results of lmms-eval or VLMEvalKit in it")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["file"] = [str(Path(file).relative_to(folder)) for file in table["file"]]
    table = table.drop_duplicates([*KEYS, "n", *SETTINGS], keep="last")
    return _sorted(table).reset_index(drop=True)


def mode_name(sparsity: dict[str, Any], default_rate: float = 0.2) -> str:
    """A run's name in tables: ``image_text``, ``random`` (the control), ``...@10%`` at another keep rate."""
    if sparsity.get("policy"):
        return _policy_name(sparsity, default_rate)
    mode = str(sparsity.get("mode", "unknown"))
    if mode == "full":
        return mode
    if sparsity.get("image_policy", "learned") != "learned":
        # The control: the same checkpoint and mode, but another chooses the image tokens.
        mode = str(sparsity["image_policy"]) if mode == "image_text" else f"{sparsity['image_policy']}_{mode}"
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    return mode if rate == default_rate else f"{mode}@{100 * rate:g}%"


def _policy_name(sparsity: dict[str, Any], default_rate: float) -> str:
    """``fastv,k=3,r=0.75``; ``visionzip@10%`` where the keep rate is the model's setting."""
    name, arguments = parse_policy(describe(str(sparsity["policy"]), sparsity.get("policy_args") or {}))
    label = describe(name, arguments)
    rate = float(sparsity.get("vision_keep_rate", default_rate))
    budgeted = "keep" in arguments_of(name) and not {"keep", "r", "n"} & {
        key.rpartition(".")[2] for key in arguments
    }
    return label if rate == default_rate or not budgeted else f"{label}@{100 * rate:g}%"


def pivot(table: pd.DataFrame) -> pd.DataFrame:
    """Rows checkpoint and mode; columns benchmark, metric and harness; then questions and kept tokens.

    Where one setting was run on different numbers of questions, the largest stands.
    """
    chosen = _sorted(table.sort_values("n").drop_duplicates(list(KEYS), keep="last"))
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for row in chosen.to_dict("records"):
        cells = out.setdefault((row["checkpoint"], row["mode"]), {})
        cells[_title(row)] = row["value"]
        cells[f"n {row['benchmark']}"] = row["n"]
    _add_counts(chosen, out)
    # Scores first, as the registry lists them; then questions; then tokens.
    by_benchmark = _sorted(chosen, first=("benchmark", "metric", "harness"))
    columns = list(dict.fromkeys(_title(row) for row in by_benchmark.to_dict("records")))
    columns += list(dict.fromkeys(f"n {name}" for name in by_benchmark["benchmark"]))
    columns += [name for name in _COUNT_COLUMNS if any(name in cells for cells in out.values())]
    index = pd.MultiIndex.from_tuples(list(out), names=["checkpoint", "mode"])
    return pd.DataFrame(list(out.values()), index=index, columns=columns)


def _title(row: Mapping[Any, Any]) -> str:
    unit = unit_of(row["metric"])
    return f"{row['benchmark']} {row['metric']}" + (f" [{unit}]" if unit else "") + f" {row['harness']}"


def _sorted(table: pd.DataFrame, first: tuple[str, ...] = ("checkpoint", "mode")) -> pd.DataFrame:
    """By the columns `first`, then the others: full context first, controls last, benchmarks as listed."""
    known = {benchmark.name: rank for rank, benchmark in enumerate(BENCHMARKS)}
    ranks = {
        "mode": lambda column: column.map(_mode_order),
        "benchmark": lambda column: column.map(lambda name: known.get(name, len(known))),
    }
    order = list(dict.fromkeys([*first, "checkpoint", "mode", "benchmark", "metric", "harness"]))
    return table.sort_values(order, key=lambda column: ranks.get(str(column.name), lambda c: c)(column))


def _add_counts(chosen: pd.DataFrame, out: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Mean image tokens kept of a sample with an image, and the share of long answers' tokens that stay."""
    for (checkpoint, mode), rows in chosen.groupby(["checkpoint", "mode"]):
        cells = out[(str(checkpoint), str(mode))]
        with_image = rows[rows["image_tokens"] > 0]
        if len(with_image):
            total, kept = with_image["image_tokens"].mean(), with_image["kept_image_tokens"].mean()
            cells[_COUNT_COLUMNS[0]] = f"{kept:.0f} of {total:.0f}"
            for title, column in zip(_COUNT_COLUMNS[2:], COUNTS[5:], strict=True):
                if with_image[column].notna().any():
                    cells[title] = f"{with_image[column].mean():.3g}"
        long = rows[(rows["generated_tokens"] >= 20) & rows["kept_output_share"].notna()]
        if len(long):
            cells[_COUNT_COLUMNS[1]] = 100 * long["kept_output_share"].mean()


def _mode_order(mode: str) -> str:
    name, _, rate = mode.partition("@")
    rank = _MODE_ORDER.index(name) if name in _MODE_ORDER else len(_MODE_ORDER)
    return f"{bool(rate):d}{rank}{mode}"  # other keep rates follow, method beside control


def _lmms_eval_rows(path: Path) -> Iterator[dict[str, Any]]:
    content = _read(path)
    manifest_path = path.with_name(path.name.removesuffix("_results.json") + f"_{MANIFEST_NAME}")
    manifest = _read(manifest_path) if manifest_path.is_file() else {}
    common = _common(manifest, content.get("config", {}).get("model_args", ""), path)
    for task, scores in content.get("results", {}).items():
        count = content.get("n-samples", {}).get(task, {}).get("effective")
        for benchmark, metric, key, factor in find_metrics(LMMS_EVAL, task):
            names = [name for name in scores if name.partition(",")[0] == key]
            values = [scores[name] for name in names if isinstance(scores[name], (int, float))]
            if values:
                counts = _counts(manifest, task)
                yield _row(
                    common, LMMS_EVAL, benchmark.name, metric.name, values[0] * factor, count, counts, path
                )


def _vlmevalkit_rows(path: Path) -> Iterator[dict[str, Any]]:
    content = _read(path)
    manifest_path = path.with_name(MANIFEST_NAME)
    manifest = _read(manifest_path) if manifest_path.is_file() else {}
    common = _common(manifest, "", path)
    model = content.get("model_name", path.parent.name)
    for dataset, entry in content.get("datasets", {}).items():
        if not isinstance(entry, dict) or entry.get("error_message"):
            continue
        metrics = entry.get("metrics") or {}
        counts = _counts(manifest, dataset)
        count = counts.get("n") or _prediction_rows(path.parent, f"{model}_{dataset}")
        for benchmark, metric, key, factor in find_metrics(VLMEVALKIT, dataset):
            names = [name for name in metrics if name == key or name.endswith(f"|{key}")]
            if names and isinstance(metrics[names[0]], (int, float)):
                value = metrics[names[0]] * factor
                yield _row(common, VLMEVALKIT, benchmark.name, metric.name, value, count, counts, path)


def _row(
    common: dict[str, Any],
    harness: str,
    benchmark: str,
    metric: str,
    value: float,
    count: int | None,
    counts: dict[str, Any],
    path: Path,
) -> dict[str, Any]:
    row = {
        **common,
        "harness": harness,
        "benchmark": benchmark,
        "metric": metric,
        "value": float(value),
        "n": count,
    }
    return {**row, **{name: counts.get(name) for name in COUNTS}, "file": str(path)}


def _common(manifest: dict[str, Any], model_args: str, path: Path) -> dict[str, Any]:
    """Checkpoint and settings of a run; of one without a manifest, what its arguments say."""
    if manifest:
        sparsity = manifest.get("sparsity") or {}
        checkpoint = (manifest.get("settings") or {}).get("checkpoint", "unknown")
    else:
        pairs = dict(part.split("=", 1) for part in str(model_args).split(",") if "=" in part)
        sparsity = {key: pairs[key] for key in ("mode", "policy", *SETTINGS) if key in pairs}
        if "policy" in pairs:
            settings = {field.name for field in fields(ModelSettings)} | {"batch_size"}
            sparsity["policy_args"] = {key: pairs[key] for key in pairs if key not in settings}
        checkpoint = Path(pairs.get("pretrained", path.parent.name)).name
    return {
        "checkpoint": checkpoint,
        "mode": mode_name(sparsity),
        "vision_keep_rate": float(sparsity["vision_keep_rate"]) if "vision_keep_rate" in sparsity else None,
        "image_policy": sparsity.get("image_policy"),
        "seconds": manifest.get("seconds"),
    }


def _counts(manifest: dict[str, Any], task: str) -> dict[str, Any]:
    tokens = manifest.get("tokens") or {}
    # The perplexity task generates nothing: the describe task's counts go with it.
    return tokens.get(task) or tokens.get(task.replace("_ppl", "_answer")) or {}


def _prediction_rows(folder: Path, stem: str) -> int | None:
    path = folder / f"{stem}.tsv"
    if path.is_file():
        return len(pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False))
    path = folder / f"{stem}.xlsx"
    return len(pd.read_excel(path)) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({error}); delete it or run the evaluation again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a harness's results; delete it or name another folder")
    return content


def render(table: pd.DataFrame, style: str) -> str:
    """The table as Markdown, CSV or LaTeX text, figures with two decimals.

    Raises
    ------
    UserError
        For another style.
    """
    if style == "csv":
        return table.to_csv(index=False)
    wide = pivot(table)
    for column in wide.columns:
        digits = 2 if f"[{PERCENT}]" in column or "ppl" in column else 0
        wide[column] = [_cell(value, digits) for value in wide[column]]
    wide = wide.reset_index()
    if style == "latex":
        return _latex(wide)
    if style == "markdown":
        lines = ["| " + " | ".join(wide.columns) + " |", "|" + "|".join(["---"] * len(wide.columns)) + "|"]
        lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in wide.to_numpy().tolist()]
        return "\n".join(lines) + "\n"
    raise UserError(f"--format: unknown value {style!r}; choose markdown, csv or latex")


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None or pd.isna(value) else f"{float(value):.{digits}f}"


def _latex(wide: pd.DataFrame) -> str:
    def escape(text: str) -> str:
        for character in ("\\", "_", "%", "&", "#"):
            text = text.replace(character, rf"\{character}" if character != "\\" else r"\textbackslash{}")
        return text

    lines = [r"\begin{tabular}{ll" + "r" * (len(wide.columns) - 2) + "}", r"\hline"]
    lines.append(" & ".join(escape(str(name)) for name in wide.columns) + r" \\ \hline")
    lines += [" & ".join(escape(str(value)) for value in row) + r" \\" for row in wide.to_numpy().tolist()]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"
