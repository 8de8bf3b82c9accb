"""Our VLMEvalKit datasets, and easy-VQA's: the same rows, prompts and metrics as the lmms-eval tasks."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import dump, get_intermediate_file_path, load

from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.own_sets.generation.vlmevalkit_datasets import (
    LVIS_VQA_Multi,
    LVIS_VQA_Single,
    ShareGPT4V_VQA,
)
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor, meteor_name
from dynllava_plugin.evaluation.vlmevalkit.model import REFERENCE, TOKEN_LIMIT
from dynllava_plugin.evaluation.vlmevalkit.vqav2 import VQAv2

SHORT_ANSWER_TOKENS = 16


class EasyVQA(ImageBaseDataset):
    """easy-VQA's own test questions: short answers, exact match in percent."""

    TYPE = "VQA"
    BENCHMARK: ClassVar[str] = "easy_vqa"
    DATASET_URL: ClassVar[dict[str, str]] = {"EasyVQA": ""}
    DATASET_MD5: ClassVar[dict[str, str]] = {}

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Return the rows in their fixed order."""
        rows = easy_vqa.load_rows(self.BENCHMARK)
        return pd.DataFrame(rows).rename(columns={"id": "index", "image": "image_path"})

    def build_prompt(self, line: Any) -> list[dict[str, Any]]:
        """Return the image, then the question."""
        line = self.data.iloc[line] if isinstance(line, int) else line
        text = {"type": "text", "value": easy_vqa.question_text(self.BENCHMARK, line["question"])}
        return [{"type": "image", "value": line["image_path"]}, {**text, **self.message_keys(line)}]

    def message_keys(self, line: Any) -> dict[str, Any]:
        """Return what the adapter needs to know beyond the question."""
        return {TOKEN_LIMIT: SHORT_ANSWER_TOKENS}

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Return ``Overall`` in percent, also written beside the predictions."""
        data = _read_predictions(eval_file)
        metrics = self.metrics(data)
        dump(pd.DataFrame([metrics]), get_intermediate_file_path(eval_file, "_acc"))
        return metrics

    def metrics(self, data: pd.DataFrame) -> dict[str, float]:
        """Return the means over the rows."""
        hits = [easy_vqa.exact_match(p, a) for p, a in zip(data["prediction"], data["answer"], strict=True)]
        return {"Overall": 100.0 * sum(hits) / len(hits)}


class EasyVQA_Scenes(EasyVQA):
    """Questions about scenes of four easy-VQA images: short answers, exact match in percent."""

    BENCHMARK: ClassVar[str] = "easy_vqa_scenes"
    DATASET_URL: ClassVar[dict[str, str]] = {"EasyVQA_Scenes": ""}


class EasyVQA_Hard(EasyVQA):
    """Questions about hard scenes: short answers, exact match in percent."""

    BENCHMARK: ClassVar[str] = "easy_vqa_hard"
    DATASET_URL: ClassVar[dict[str, str]] = {"EasyVQA_Hard": ""}


class EasyVQA_Describe(EasyVQA):
    """Long answers about scenes: METEOR of the greedy answer in percent, perplexity of the reference."""

    BENCHMARK: ClassVar[str] = "easy_vqa_describe"
    DATASET_URL: ClassVar[dict[str, str]] = {"EasyVQA_Describe": ""}

    def message_keys(self, line: Any) -> dict[str, Any]:
        return {REFERENCE: line["answer"]}

    def metrics(self, data: pd.DataFrame) -> dict[str, float]:
        scores = [meteor(a, p) for p, a in zip(data["prediction"], data["answer"], strict=True)]
        metrics = {meteor_name(): 100.0 * sum(scores) / len(scores)}
        # Absent where the kit reuses an old run's predictions: it keeps their text only.
        records = [
            ast.literal_eval(str(text)) for text in data.get("extra_records", []) if str(text).startswith("{")
        ]
        if len(records) == len(data):
            metrics["ppl"] = sum(record["ppl"] for record in records) / len(records)
        return metrics


_DATASETS = (
    EasyVQA,
    EasyVQA_Scenes,
    EasyVQA_Hard,
    EasyVQA_Describe,
    VQAv2,
    LVIS_VQA_Single,
    LVIS_VQA_Multi,
    ShareGPT4V_VQA,
)


def register() -> None:
    """Make the datasets known to the kit."""
    import vlmeval.dataset as kit

    for dataset in _DATASETS:
        if dataset not in kit.DATASET_CLASSES:
            kit.DATASET_CLASSES.insert(0, dataset)
            kit.SUPPORTED_DATASETS.extend(dataset.supported_datasets())
            setattr(kit, dataset.__name__, dataset)


def _read_predictions(path: str) -> pd.DataFrame:
    """The prediction file, with text columns as text: ``yes``, ``None`` or ``007`` mean what they say."""
    if Path(path).suffix == ".tsv":
        return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    data = load(path)
    for column in ("prediction", "answer"):
        data[column] = ["" if pd.isna(value) else str(value) for value in data[column]]
    return data
