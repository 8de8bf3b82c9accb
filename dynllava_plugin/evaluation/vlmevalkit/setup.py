"""What VLMEvalKit has to know before it runs: our model and datasets, local data, no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from dynllava_plugin.errors import UserError, nearest
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.results.record import RunRecord
from dynllava_plugin.evaluation.settings import ModelSettings

MODEL_NAME = "dynllava"


def import_kit() -> ModuleType:
    """Return the kit's command line: the package's ``vlmeval.run``, or an upstream checkout's ``run.py``.

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


def register(patches: Patches, settings: ModelSettings, **arguments: Any) -> None:
    """Make the model, with `arguments` of its constructor, and the datasets known to the kit."""
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from dynllava_plugin.evaluation.vlmevalkit import datasets
    from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava

    shared = {name: arguments[name] for name in ("record", "load")}
    supported_VLM[MODEL_NAME] = partial(
        _build_or_exit, partial(DynamicLlava, **arguments, **settings.given())
    )
    if not hasattr(vlmeval.vlm, "DynamicLlava"):
        vlmeval.vlm.DynamicLlava = DynamicLlava
    patches.put(vlmeval.vlm, "DynamicLlava", lambda before: partial(DynamicLlava, **shared))  # for --config
    datasets.register()


def known_datasets() -> list[str]:
    """Return the names of all datasets that the kit has, ours included once they are registered."""
    from vlmeval.dataset import SUPPORTED_DATASETS

    return list(SUPPORTED_DATASETS)


def check_models(names: Iterable[str]) -> None:
    """Raise `UserError` for a model that the kit hasn't got."""
    from vlmeval.config import supported_VLM

    for name in names:
        if name not in supported_VLM:
            near = nearest(name, [MODEL_NAME, *supported_VLM], f"ours is {MODEL_NAME}")
            raise UserError(f"--model {name}: no such model; {near}")


def check_datasets(names: Iterable[str]) -> None:
    """Raise `UserError` for a name that is neither a dataset of the kit's nor a TSV file in its data folder."""
    from vlmeval.dataset.video_dataset_config import supported_video_datasets
    from vlmeval.smp import LMUDataRoot

    known = {*known_datasets(), *supported_video_datasets}
    for name in names:
        if name not in known and not (Path(LMUDataRoot()) / f"{name}.tsv").is_file():
            near = nearest(name, known, "`dynllava benchmarks` lists those of the paper")
            raise UserError(f"--data {name}: no such dataset; {near}")


def leave_unscored(patches: Patches, names: Iterable[str]) -> set[str]:
    """Let those of `names` that are a user's own questions end with their answers, and return them.

    The kit scores such a TSV only where it is multiple choice with a column of answers.
    """
    import pandas as pd
    import vlmeval.dataset as kit
    from vlmeval.dataset.video_dataset_config import supported_video_datasets
    from vlmeval.smp import LMUDataRoot

    unscored = set()
    for name in {*names} - {*known_datasets(), *supported_video_datasets}:
        columns = set(pd.read_csv(Path(LMUDataRoot()) / f"{name}.tsv", sep="\t", nrows=0).columns)
        if not {"A", "B", "answer"} <= columns:
            unscored.add(name)

    def leaving(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_or_leave(self: Any, *args: Any, **kwargs: Any) -> Any:
            return None if self.dataset_name in unscored else evaluate(self, *args, **kwargs)

        return evaluate_or_leave

    for custom in (kit.CustomVQADataset, kit.CustomMCQDataset, kit.CustomTextMCQDataset) if unscored else ():
        patches.put(custom, "evaluate", leaving)
    return unscored


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


def share_processes(patches: Patches, record: RunRecord) -> None:
    """Let the kit's processes talk through gloo where there are no GPUs, and bring their notes together at its end.

    Their group stays for the next run of this process; `leave_processes` ends it.
    """
    import torch
    import torch.distributed as dist

    def joining(initialize: Callable[..., Any]) -> Callable[..., Any]:
        def join(*args: Any, **kwargs: Any) -> None:
            if not dist.is_initialized():
                initialize(
                    *args, **({**kwargs, "backend": "gloo"} if not torch.cuda.is_available() else kwargs)
                )

        return join

    patches.put(dist, "init_process_group", joining)
    patches.put(dist, "destroy_process_group", lambda before: lambda *args, **kwargs: record.gather())


def leave_processes() -> None:
    """End the group of this process's runs, where there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
