"""What a suite evaluates: a YAML file with the command line laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.evaluation.benchmarks import HARNESSES, Benchmark, find_benchmark
from dynllava_plugin.evaluation.options import checked, option
from dynllava_plugin.evaluation.settings import ModelSettings, RunSettings

BOTH = "both"
_MODEL = {item.name: item for item in fields(ModelSettings)}


@dataclass(frozen=True)
class SuiteConfig(RunSettings):
    """All settings of a suite; a YAML file's keys are these names and those of `ModelSettings`.

    Each of the modes in `model` is evaluated on its own; none: as the checkpoint says.
    """

    benchmarks: tuple[str, ...] = option(
        "these instead of the suite's: names of `dynllava benchmarks`, or a harness's tasks",
        default=(),
        metavar="NAME",
        several=True,
    )
    harness: str = option(
        "instead of the suite's (both where it says nothing)", default=BOTH, choices=(*HARNESSES, BOTH)
    )
    num_processes: int = option("GPUs (or processes) that share a benchmark's questions", int, 1, least=1)
    jobs: int = option("processes at a time, each with the checkpoint in memory", int, 1, least=1)
    data: Path | None = option(
        "local datasets: DIR/datasets/<owner>/<name>, DIR/LMUData", Path, metavar="DIR"
    )
    images: Path | None = option("images of the generation sets, e.g. coco/train2017", Path, metavar="DIR")
    judge_url: str | None = option("OpenAI-compatible endpoint, ending in /v1", metavar="URL")
    judge_model: str | None = option("the model to ask there", metavar="NAME")
    output: Path | None = option("default: results/<suite>", Path, metavar="DIR")
    model: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any]) -> SuiteConfig:
        """Return the settings of a file, or of the packaged suite of that name, what `overrides` gives (not None) in their place.

        Raises
        ------
        UserError
            Naming the key or value that is wrong.
        """
        import yaml

        path = find_suite(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror})") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML ({one_line(error, 200)})") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected keys like `benchmarks: [GQA, POPE]`")
        own = {item.name: item for item in fields(cls) if item.metadata}
        known = {**own, **_MODEL}
        unknown = sorted(map(str, set(content) - set(known)))
        if {"model", "tasks"} & set(unknown):
            raise UserError(f"{path}: not a suite but lmms-eval's; use lmms_eval --config {path}")
        if unknown:
            raise UserError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        values = {**content, **{key: value for key, value in overrides.items() if value is not None}}
        settings = {key: value for key, value in values.items() if value is not None}
        model = {key: _model_setting(key, settings.pop(key), path) for key in _MODEL if key in settings}
        config = cls(**{key: checked(own[key], value, path) for key, value in settings.items()}, model=model)
        if config.output is None:
            config = replace(config, output=Path("results") / path.stem)
        config.check(path)
        return config

    def check(self, path: Path) -> None:
        """Check every value that can be checked without loading anything."""
        if not self.benchmarks:
            raise UserError(f"{path}: `benchmarks` is empty")
        pretrained = self.model.get("pretrained", "")
        if not pretrained:
            raise UserError("--pretrained: name a checkpoint (a folder, a hub id, or tiny)")
        if "," in pretrained or "=" in pretrained:
            raise UserError(f"--pretrained {pretrained}: lmms-eval can't take a name with ',' or '='")
        if set(",=") & set(self.model.get("system_prompt", "")):
            raise UserError("--system-prompt: lmms-eval can't take one with ',' or '='")
        for key in ("data", "images"):
            folder = getattr(self, key)
            if folder is not None and not folder.is_dir():
                raise UserError(f"--{key} {folder}: no such folder")
        if self.left_out() == self.wanted():
            names = ", ".join(benchmark.name for benchmark in self.wanted())
            raise UserError(f"--harness {self.harness}: has no task for {names}")
        self.settings()

    def given(self) -> dict[str, Any]:
        """Return all settings that aren't empty, the model's among them."""
        everything = {**vars(self), **self.model}
        return {key: value for key, value in everything.items() if key != "model" and value not in (None, ())}

    def wanted(self) -> list[Benchmark]:
        """Return the benchmarks, each once, in the order given."""
        return list(dict.fromkeys(find_benchmark(name) for name in self.benchmarks))

    def left_out(self) -> list[Benchmark]:
        """Return the benchmarks that no chosen harness has."""
        return [item for item in self.wanted() if not any(item.tasks(name) for name in self.harnesses())]

    def harnesses(self) -> tuple[str, ...]:
        """Return the harnesses to run."""
        return HARNESSES if self.harness == BOTH else (self.harness,)

    def settings(self) -> list[ModelSettings]:
        """Return the model's settings, one for each mode."""
        given = dict(self.model)
        if Path(given["pretrained"]).is_dir():
            given["pretrained"] = str(Path(given["pretrained"]).resolve())
        modes = dict.fromkeys(given.pop("mode", None) or (None,))
        return [ModelSettings.from_dict({**given, "mode": mode}) for mode in modes]


def find_suite(given: Path) -> Path:
    """Return the YAML file that `given` means: a file of the user's, or else the packaged suite of that name.

    Raises
    ------
    UserError
        For a name that no packaged suite has, with the names there are, and for a packaged suite's file that isn't
        here (the documentation's `eval_configs/NAME.yaml`, typed outside a checkout), with its name.
    """
    if given.is_file():
        return given
    packaged = {path.stem: path for path in sorted(_folder().glob("*.yaml"))}
    if given.suffix and given.stem in packaged:
        raise UserError(f"{given}: no such file; the packaged suite is `dynllava eval {given.stem}`")
    if given.suffix:
        return given
    if str(given) not in packaged:
        names = ", ".join(name for name in packaged if not name.startswith("lmms_eval_"))
        raise UserError(f"{given}: no such suite; packaged are {names}, or name a file of your own, my.yaml")
    return packaged[str(given)]


def _folder() -> Path:
    """The folder with the suites: `evaluation/suites` of a built wheel, `eval_configs` of a checkout."""
    installed = Path(str(files("dynllava_plugin.evaluation") / "suites"))
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "eval_configs"


def _model_setting(key: str, value: Any, path: Path) -> Any:
    """One of the model's settings as a suite has it: modes are several."""
    metadata = {**_MODEL[key].metadata, "several": key == "mode"}
    return checked(SimpleNamespace(name=key, metadata=metadata), value, path)
