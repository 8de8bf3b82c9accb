"""Our VLMEvalKit datasets, with the rows, prompts, rounds and metrics of our lmms-eval tasks, and VQAv2, which the kit lacks."""

from __future__ import annotations

import ast
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.image_vqa import ImageVQADataset
from vlmeval.smp import LMUDataRoot, dump, get_intermediate_file_path, load

from dynllava_plugin.easy_vqa.writing import SHORT_ANSWER
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import find_benchmark
from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.own_sets.long_answers import load_rows, mean_meteor
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor_name
from dynllava_plugin.evaluation.vlmevalkit.model import REFERENCE, TOKEN_LIMIT, TURNS
from dynllava_plugin.files import write_bytes, write_text

SHORT_ANSWER_TOKENS = 16
VQAV2 = "VQAv2_VAL"


class OwnSet(ImageBaseDataset):
    """A dataset whose rows are ours: an image, then a question."""

    TYPE = "VQA"
    DATASET_MD5: ClassVar[dict[str, str]] = {}

    def build_prompt(self, line: Any) -> list[dict[str, Any]]:
        """Return the image, then the question with what the adapter needs to know beyond it."""
        line = self.data.iloc[line] if isinstance(line, int) else line
        return [{"type": "image", "value": line["image_path"]}, {"type": "text", **self.text_item(line)}]

    @abstractmethod
    def text_item(self, line: Any) -> dict[str, Any]:
        """Return a row's question as ``value``, and what else the adapter needs to know."""

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Return the metrics, also written beside the predictions."""
        metrics = self.metrics(_read_predictions(eval_file))
        dump(pd.DataFrame([metrics]), get_intermediate_file_path(eval_file, "_acc"))
        return metrics

    @abstractmethod
    def metrics(self, data: pd.DataFrame) -> dict[str, float]:
        """Return the means over the rows."""


class EasyVQA(OwnSet):
    """easy-VQA's own test questions, and those about scenes: short answers, exact match in percent."""

    DATASET_URL: ClassVar[dict[str, str]] = dict.fromkeys(("EasyVQA", "EasyVQA_Scenes", "EasyVQA_Hard"), "")

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Return the rows in their fixed order."""
        rows = easy_vqa.load_rows(find_benchmark(dataset).name)
        return pd.DataFrame(rows).rename(columns={"id": "index", "image": "image_path"})

    def text_item(self, line: Any) -> dict[str, Any]:
        return {"value": line["question"] + SHORT_ANSWER, TOKEN_LIMIT: SHORT_ANSWER_TOKENS}

    def metrics(self, data: pd.DataFrame) -> dict[str, float]:
        hits = [easy_vqa.exact_match(p, a) for p, a in zip(data["prediction"], data["answer"], strict=True)]
        return {"Overall": 100.0 * sum(hits) / len(hits)}


class EasyVQA_Describe(EasyVQA):
    """Long answers about scenes: METEOR of the greedy answer in percent, perplexity of the reference."""

    DATASET_URL: ClassVar[dict[str, str]] = {"EasyVQA_Describe": ""}

    def text_item(self, line: Any) -> dict[str, Any]:
        return {"value": line["question"], REFERENCE: line["answer"]}

    def metrics(self, data: pd.DataFrame) -> dict[str, float]:
        return _of_long_answers(
            data, [([a], [p]) for a, p in zip(data["answer"], data["prediction"], strict=True)]
        )


class GenerationSet(OwnSet):
    """The paper's generation sets, one or several rounds: METEOR in percent and perplexity of the references."""

    DATASET_URL: ClassVar[dict[str, str]] = dict.fromkeys(
        ("LVIS_VQA_Single", "LVIS_VQA_Multi", "ShareGPT4V_VQA"), ""
    )

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Return a frame with columns index (the row's number: ids may repeat, the kit's index mustn't), id, image_path, question (the
        first), turns (JSON)."""
        rows = load_rows(dataset.lower())
        return pd.DataFrame(
            {
                "index": range(len(rows)),
                "id": [row["id"] for row in rows],
                "image_path": [row["image"] for row in rows],
                "question": [row["turns"][0][0] for row in rows],
                "turns": [json.dumps(row["turns"], ensure_ascii=False) for row in rows],
            }
        )

    def text_item(self, line: Any) -> dict[str, Any]:
        return {"value": line["question"], TURNS: json.loads(line["turns"])}

    def metrics(self, data: pd.DataFrame) -> dict[str, float]:
        references = [[answer for _, answer in json.loads(turns)] for turns in data["turns"]]
        return _of_long_answers(data, list(zip(references, map(json.loads, data["prediction"]), strict=True)))


class VQAv2(ImageVQADataset):
    """214,354 questions with ten answers each: short answers, VQA's soft score in percent (the kit's own).

    The first use writes ``$LMUData/VQAv2_VAL.tsv`` and the images from lmms-eval's copy on the hub, so that
    both harnesses ask the same questions of the same images.
    """

    DATASET_URL: ClassVar[dict[str, str]] = {VQAV2: ""}
    DATASET_MD5: ClassVar[dict[str, str]] = {}

    def load_data(self, dataset: str) -> pd.DataFrame:
        """Return a frame with columns index, question, answer (ten answers' list as text), image_path (absolute) or image (base64).

        Raises
        ------
        UserError
            For a user's own file without a column of images.
        """
        root = Path(LMUDataRoot())
        path = root / f"{dataset}.tsv"
        if not path.is_file():
            write_text(path, _from_hub(root / "images" / dataset).to_csv(sep="\t", index=False))
        data = pd.read_csv(path, sep="\t", dtype={"question": str, "answer": str}, keep_default_na=False)
        if missing := [name for name in ("index", "question", "answer") if name not in data]:
            raise UserError(f"{path}: it has no column {missing[0]}")
        if "image" in data:  # as the kit's own files have it
            return data
        if "image_path" not in data:
            raise UserError(f"{path}: it has neither a column image (base64) nor image_path")
        data["image_path"] = [str(root / "images" / dataset / name) for name in data["image_path"]]
        return data


def _from_hub(folder: Path) -> pd.DataFrame:
    """The rows, after writing each image once to `folder`."""
    from datasets import Image, load_dataset

    repo = find_benchmark("VQAv2").repo
    try:
        rows = load_dataset(repo, split="validation")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{VQAV2}: {repo} isn't here and can't be downloaded ({type(error).__name__}); put its files into "
            f"./{repo}, or {VQAV2}.tsv into $LMUData"
        ) from None
    table: list[dict[str, Any]] = []
    for row in rows.cast_column("image", Image(decode=False)):
        # COCO's files; other formats keep their ending.
        name = f"{row['image_id']:012d}{Path(row['image']['path'] or '.jpg').suffix or '.jpg'}"
        if not (folder / name).is_file():
            write_bytes(folder / name, row["image"]["bytes"])
        answers = [answer["answer"] for answer in row["answers"]]
        table.append(
            {
                "index": row["question_id"],
                "image_path": name,
                "question": row["question"],
                "answer": str(answers),
            }
        )
    return pd.DataFrame(table)


def _of_long_answers(data: pd.DataFrame, answers: list[tuple[list[str], list[str]]]) -> dict[str, float]:
    """METEOR of each row's (references, answers), and the perplexity that the adapter noted of each."""
    scores = [mean_meteor(*row) for row in answers]
    metrics = {meteor_name(): 100.0 * sum(scores) / len(scores)}
    # Absent where the kit reuses an old run's predictions: it keeps their text only.
    records = [str(text) for text in data.get("extra_records", []) if str(text).startswith("{")]
    if len(records) == len(data):
        metrics["ppl"] = sum(ast.literal_eval(record)["ppl"] for record in records) / len(records)
    return metrics


def register() -> None:
    """Make the datasets known to the kit; a configuration file's class is called like its dataset, too."""
    import vlmeval.dataset as kit

    for kind in (EasyVQA, EasyVQA_Describe, VQAv2, GenerationSet):
        if kind not in kit.DATASET_CLASSES:
            kit.DATASET_CLASSES.insert(0, kind)
            kit.SUPPORTED_DATASETS.extend(kind.supported_datasets())
            for name in (kind.__name__, *kind.supported_datasets()):
                setattr(kit, name, kind)


def _read_predictions(path: str) -> pd.DataFrame:
    """The prediction file, with text columns as text: ``yes``, ``None`` or ``007`` mean what they say."""
    if Path(path).suffix == ".tsv":
        return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    data = load(path)
    for column in {"prediction", "answer"} & set(data):
        data[column] = ["" if pd.isna(value) else str(value) for value in data[column]]
    return data
