"""The generation sets as VLMEvalKit datasets: the same rows, rounds and metrics as the lmms-eval tasks."""

from __future__ import annotations

import ast
import json
from typing import Any, ClassVar

import pandas as pd
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import dump, get_intermediate_file_path

from dynllava_plugin.evaluation.own_sets.generation.sets import load_rows, mean_meteor
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor_name
from dynllava_plugin.evaluation.vlmevalkit.model import TURNS


class GenerationSet(ImageBaseDataset):
    """Long answers, one or several rounds: METEOR in percent and perplexity of the references."""

    TYPE = "VQA"
    SET: ClassVar[str] = ""
    DATASET_URL: ClassVar[dict[str, str]] = {}
    DATASET_MD5: ClassVar[dict[str, str]] = {}

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Return a frame with columns index (the row's number: ids may repeat, the kit's index mustn't), id, image_path, question (the
        first), turns (JSON)."""
        rows = load_rows(self.SET)
        return pd.DataFrame(
            {
                "index": range(len(rows)),
                "id": [row["id"] for row in rows],
                "image_path": [row["image"] for row in rows],
                "question": [row["turns"][0][0] for row in rows],
                "turns": [json.dumps(row["turns"], ensure_ascii=False) for row in rows],
            }
        )

    def build_prompt(self, line: Any) -> list[dict[str, Any]]:
        """Return the image, and the first question with the whole conversation behind it."""
        line = self.data.iloc[line] if isinstance(line, int) else line
        text = {"type": "text", "value": line["question"], TURNS: json.loads(line["turns"])}
        return [{"type": "image", "value": line["image_path"]}, text]

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Return ``meteor`` (or ``meteor_exact_stem``) and ``ppl``, also written beside the predictions."""
        data = pd.read_csv(eval_file, sep="\t", dtype=str, keep_default_na=False)
        meteors, perplexities = [], []
        for row in data.to_dict("records"):
            references = [answer for _, answer in json.loads(row["turns"])]
            meteors.append(mean_meteor(references, json.loads(row["prediction"])))
            record = str(row.get("extra_records", ""))
            if record.startswith("{"):
                perplexities.append(ast.literal_eval(record)["ppl"])
        metrics = {meteor_name(): 100 * sum(meteors) / len(meteors)}
        if len(perplexities) == len(data):
            metrics["ppl"] = sum(perplexities) / len(perplexities)
        dump(pd.DataFrame([metrics]), get_intermediate_file_path(eval_file, "_acc"))
        return metrics


class LVIS_VQA_Single(GenerationSet):
    """LVIS-VQA, one round."""

    SET: ClassVar[str] = "lvis_vqa_single"
    DATASET_URL: ClassVar[dict[str, str]] = {"LVIS_VQA_Single": ""}


class LVIS_VQA_Multi(GenerationSet):
    """LVIS-VQA, more than seven rounds."""

    SET: ClassVar[str] = "lvis_vqa_multi"
    DATASET_URL: ClassVar[dict[str, str]] = {"LVIS_VQA_Multi": ""}


class ShareGPT4V_VQA(GenerationSet):
    """ShareGPT4V's long captions."""

    SET: ClassVar[str] = "sharegpt4v_vqa"
    DATASET_URL: ClassVar[dict[str, str]] = {"ShareGPT4V_VQA": ""}
