"""How what was measured is called and written, in tables and in the lines of a run."""

from __future__ import annotations

from typing import Any

# field -> (heading, factor, format), in the order of a table's columns
FIGURES: dict[str, tuple[str, float, str]] = {
    "harness": ("harness", 1, ""),
    "batch": ("batch", 1, ""),
    "length": ("at", 1, ""),
    "mode": ("mode", 1, ""),
    "path": ("path", 1, ""),
    "kept": ("kept", 1, ""),
    "implementation": ("implementation", 1, ""),
    "median_s": ("ms", 1e3, ",.2f"),
    "baseline_s": ("baseline ms", 1e3, ",.2f"),
    "requests_per_s": ("requests/s", 1, ".3g"),
    "questions_per_s": ("questions/s", 1, ".1f"),
    "samples_per_s": ("samples/s", 1, ".2f"),
    "tokens_per_s": ("tokens/s", 1, ".3g"),
    "first_token_s": ("ms to the first token", 1e3, ".2f"),
    "speedup": ("speed-up", 1, ".2f"),
    "first_token_speedup": ("speed-up to the first", 1, ".2f"),
    "ideal_speedup": ("ideal", 1, ".2f"),
    "of_ideal": ("measured/ideal", 1, ".2f"),
    "time_ratio": ("of plain's time", 1, ".3f"),
    "memory_ratio": ("of plain's memory", 1, ".3f"),
    "tflops_paper": ("TFLOPs (Eq. 13)", 1, ".3g"),
    "tflops_exact": ("TFLOPs (exact)", 1, ".3g"),
    "mfu": ("MFU", 1, ".1%"),
    "peak_tflops": ("TFLOP/s that MFU is of", 1, ".3g"),
    "peak_from": ("from", 1, ""),
    "devices": ("devices", 1, ""),
    "epoch_hours": ("hours an epoch of 665K", 1, ",.0f"),
    "kept_share": ("text kept", 1, ".3g"),
    "max_difference": ("largest difference", 1, ".3g"),
    "outside_model": ("outside the model", 1, ".1%"),
    "shared": ("prefill shared", 1, ".0%"),
    "same_answers": ("same answers", 1, ""),
    "cache_bytes": ("cache MiB", 2**-20, ",.1f"),
    "resident_bytes": ("in memory MiB", 2**-20, ",.1f"),
    "needed_bytes": ("needed MiB", 2**-20, ",.1f"),
    "growth_bytes": ("growth step MiB", 2**-20, ",.1f"),
    "peak_bytes": ("peak MiB", 2**-20, ",.1f"),
    "weight_bytes": ("weights MiB", 2**-20, ",.1f"),
    "requests": ("requests", 1, ""),
    "fits": ("fits", 1, ""),
    "optimizer": ("optimizer", 1, ""),
    "checkpointing": ("checkpointing", 1, ""),
}
_NAMES = ("phase", "harness", "mode", "implementation", "path", "kept")
_LINE = ("median_s", "speedup", "of_ideal", "time_ratio", "memory_ratio", "mfu", "questions_per_s", "requests_per_s",
         "first_token_s", "cache_bytes", "peak_bytes")  # fmt: skip


def heading(field: str) -> str:
    """Return the heading of a field's column."""
    return FIGURES[field][0] if field in FIGURES else field


def written(field: str, value: Any) -> str:
    """Return a field's value as tables show it; "-" for what there is none of."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(written(field, part) for part in value)
    if isinstance(value, str):
        return value
    _, factor, style = FIGURES.get(field, (field, 1, ""))
    return format(value * factor if factor != 1 else value, style)


def described(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    names = " ".join(str(row[name]) for name in _NAMES if row.get(name) not in (None, "-"))
    figures = [f"{written(name, row[name])} {heading(name)}" for name in _LINE if row.get(name) is not None]
    figures += ["does not fit"] if row.get("fits") is False else []
    return f"{names:34s} batch {row['batch']:<2d} at {row.get('length', '-')!s:<5s} {'  '.join(figures)}"
