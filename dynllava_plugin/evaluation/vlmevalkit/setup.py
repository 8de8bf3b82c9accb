"""What VLMEvalKit has to know before it runs: our model and datasets, local data, no GPU, no judge."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from dynllava_plugin.errors import UserError, nearest
from dynllava_plugin.evaluation.settings import ModelSettings

MODEL_NAME = "dynllava"


def import_kit() -> ModuleType:
    """The kit's command line: the package's ``vlmeval.run``, or an upstream checkout's ``run.py``.

    It is imported before CUDA is used, because it assigns each process its GPUs.
    """
    try:
        package = importlib.import_module("vlmeval")
    except ModuleNotFoundError as error:
        if error.name != "vlmeval":
            raise
        raise UserError(
            "VLMEvalKit isn't installed: run `pip install ms-vlmeval` or install a checkout"
        ) from None
    try:
        return importlib.import_module("vlmeval.run")
    except ModuleNotFoundError as error:
        if error.name != "vlmeval.run":
            raise
    path = Path(str(package.__file__)).parents[1] / "run.py"
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"VLMEvalKit: neither vlmeval.run nor {path} exists; reinstall it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(settings: ModelSettings, **arguments: Any) -> None:
    """Make the model, with `arguments` of its constructor, and the datasets known to the kit, in place."""
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from dynllava_plugin.evaluation.results.records import RECORD
    from dynllava_plugin.evaluation.vlmevalkit import datasets as vlmevalkit_datasets
    from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava

    RECORD.clear()
    given = {key: value for key, value in settings.to_dict().items() if value is not None}
    build = partial(DynamicLlava, **arguments, **given)
    supported_VLM[MODEL_NAME] = partial(_build_or_exit, build)
    vlmeval.vlm.DynamicLlava = DynamicLlava
    vlmevalkit_datasets.register()


def known_datasets() -> list[str]:
    """The names of all datasets that the kit has, ours included once they are registered."""
    from vlmeval.dataset import SUPPORTED_DATASETS

    return list(SUPPORTED_DATASETS)


def check_datasets(names: Iterable[str]) -> None:
    """`UserError` for a name that is neither a dataset of the kit's nor a TSV file in its data folder."""
    from vlmeval.dataset.video_dataset_config import supported_video_datasets
    from vlmeval.smp import LMUDataRoot

    known = {*known_datasets(), *supported_video_datasets}
    for name in names:
        if name not in known and not (Path(LMUDataRoot()) / f"{name}.tsv").is_file():
            near = nearest(name, known, "`dynllava benchmarks` lists those of the paper")
            raise UserError(f"--data {name}: no such dataset; {near}")


def _build_or_exit(build: Any) -> Any:
    """A checkpoint that can't be loaded ends the run: the kit would try it again for each dataset."""
    try:
        return build()
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def use_local_data(folder: Path) -> None:
    """Read the TSV files in `folder` as they are: the kit would download what its checksum doesn't fit.

    Raises
    ------
    UserError
        If the folder doesn't exist (the kit would silently take ``~/LMUData``).
    """
    if not folder.is_dir():
        raise UserError(f"--data-root {folder}: no such folder")
    os.environ["LMUData"] = str(folder.resolve())
    import vlmeval.dataset as kit

    local = {path.stem for path in folder.glob("*.tsv")}
    for dataset in kit.DATASET_CLASSES:
        for name in local & set(getattr(dataset, "DATASET_MD5", {})):
            dataset.DATASET_MD5[name] = None


def without_judge(datasets: Iterable[str]) -> None:
    """Leave these datasets, which only a judge can score, at their predictions."""
    import vlmeval.dataset as kit

    def no_score(*args: Any, **kwargs: Any) -> None:
        return None

    for name in datasets:
        for dataset in kit.DATASET_CLASSES:
            if name in getattr(dataset, "DATASET_URL", {}):
                dataset.evaluate = staticmethod(no_score)


def use_gloo() -> None:
    """The kit asks for NCCL; without GPUs several processes talk through gloo."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        return
    initialize = dist.init_process_group

    def with_gloo(*args: Any, **kwargs: Any) -> Any:
        return initialize(*args, **{**kwargs, "backend": "gloo"})

    dist.init_process_group = with_gloo


def gather_before_leaving() -> None:
    """Bring the processes' notes together before the kit ends their group."""
    import torch.distributed as dist

    from dynllava_plugin.evaluation.results.records import RECORD

    leave = dist.destroy_process_group

    def gathered(*args: Any, **kwargs: Any) -> Any:
        RECORD.gather()
        return leave(*args, **kwargs)

    dist.destroy_process_group = gathered
