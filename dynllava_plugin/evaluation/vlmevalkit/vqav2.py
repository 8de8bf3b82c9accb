"""VQAv2's validation split as a VLMEvalKit dataset, which the kit lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from vlmeval.dataset.image_vqa import ImageVQADataset
from vlmeval.smp import LMUDataRoot

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import find_benchmark
from dynllava_plugin.files import write_bytes, write_text

NAME = "VQAv2_VAL"


class VQAv2(ImageVQADataset):
    """214,354 questions with ten answers each: short answers, VQA's soft score in percent (the kit's own).

    The first use writes ``$LMUData/VQAv2_VAL.tsv`` and the images from lmms-eval's copy on the hub, so that
    both harnesses ask the same questions of the same images.
    """

    DATASET_URL: ClassVar[dict[str, str]] = {NAME: ""}
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
            f"{NAME}: {repo} isn't here and can't be downloaded ({type(error).__name__}); put its files into "
            f"./{repo}, or {NAME}.tsv into $LMUData"
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
