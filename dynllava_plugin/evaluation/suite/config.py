"""What a suite evaluates: a YAML file with the command line laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import HARNESSES, Benchmark, find_benchmark
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.suite.packaged import find_suite
from dynllava_plugin.evaluation.vlmevalkit.prompts import PROMPTS

BOTH = "both"
_POSITIVE = ("limit", "batch_size", "num_processes", "jobs", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class SuiteConfig:
    """All settings of a suite; a YAML file's keys are these names.

    Attributes
    ----------
    benchmarks : tuple of str
        Names of `dynllava benchmarks`, or a harness's task names.
    pretrained, device, dtype, attn_implementation, quantization, vision_keep_rate, text_keep_rate, image_policy, random_seed, policy,
    system_prompt, min_pixels, max_pixels
        As `ModelSettings`.
    mode : tuple of str
        Each is evaluated on its own; empty: as the checkpoint says.
    harness : str
        ``lmms-eval``, ``vlmevalkit`` or ``both``.
    limit : int or None
        Questions of each benchmark.
    batch_size, num_processes : int
        Neither changes an answer.
    jobs : int
        Benchmarks at a time.
    prompts : str
        ``llava`` or ``kit``: who words VLMEvalKit's questions.
    data, images, output : Path or None
        Folder of local datasets; image folder of the generation sets; results.
    judge_url, judge_model : str or None
        An OpenAI-compatible endpoint other than OpenAI's, and its model.
    """

    benchmarks: tuple[str, ...] = ()
    pretrained: str = ""
    mode: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    quantization: str | None = None
    vision_keep_rate: float | None = None
    text_keep_rate: float | None = None
    image_policy: str | None = None
    random_seed: int | None = None
    policy: str | None = None
    system_prompt: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    harness: str = BOTH
    limit: int | None = None
    batch_size: int = 8
    num_processes: int = 1
    jobs: int = 1
    prompts: str = PROMPTS[0]
    data: Path | None = None
    images: Path | None = None
    output: Path | None = None
    judge_url: str | None = None
    judge_model: str | None = None

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any]) -> SuiteConfig:
        """The settings of a file, or of the packaged suite of that name, with what the command line gave (not None) in their place.

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
            raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected keys like `benchmarks: [GQA, POPE]`")
        known = {field.name for field in fields(cls)}
        unknown = sorted(map(str, set(content) - known))
        if {"model", "tasks"} & set(unknown):
            raise UserError(f"{path}: not a suite but lmms-eval's; use lmms_eval --config {path}")
        if unknown:
            raise UserError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        values = {**content, **{key: value for key, value in overrides.items() if value is not None}}
        config = cls(**{key: _typed(path, key, value) for key, value in values.items() if value is not None})
        if config.output is None:
            config = replace(config, output=Path("results") / path.stem)
        config.check(path)
        return config

    def check(self, path: Path) -> None:
        """Every value that can be checked without loading anything."""
        if not self.benchmarks:
            raise UserError(f"{path}: `benchmarks` is empty")
        if not self.pretrained:
            raise UserError("--pretrained: name a checkpoint (a folder, a hub id, or tiny)")
        if "," in self.pretrained or "=" in self.pretrained:
            raise UserError(f"--pretrained {self.pretrained}: lmms-eval can't take a name with ',' or '='")
        if set(",=") & set(self.system_prompt or ""):
            raise UserError("--system-prompt: lmms-eval can't take one with ',' or '='")
        if self.harness not in (*HARNESSES, BOTH):
            raise UserError(f"--harness: unknown value {self.harness!r}; choose {', '.join(HARNESSES)}, both")
        if self.prompts not in PROMPTS:
            raise UserError(f"--prompts: unknown value {self.prompts!r}; choose {' or '.join(PROMPTS)}")
        for key in _POSITIVE:
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"--{key.replace('_', '-')} {value}: must be a positive integer")
        for key in ("data", "images"):
            folder = getattr(self, key)
            if folder is not None and not folder.is_dir():
                raise UserError(f"--{key} {folder}: no such folder")
        if self.left_out() == self.wanted():
            names = ", ".join(benchmark.name for benchmark in self.wanted())
            raise UserError(f"--harness {self.harness}: has no task for {names}")
        self.settings()

    def wanted(self) -> list[Benchmark]:
        """The benchmarks, each once, in the order given."""
        return list(dict.fromkeys(find_benchmark(name) for name in self.benchmarks))

    def left_out(self) -> list[Benchmark]:
        """Those of them that no chosen harness has."""
        return [item for item in self.wanted() if not any(item.tasks(name) for name in self.harnesses())]

    def harnesses(self) -> tuple[str, ...]:
        """Those to run."""
        return HARNESSES if self.harness == BOTH else (self.harness,)

    def settings(self) -> list[ModelSettings]:
        """The model's settings, one for each mode."""
        pretrained = self.pretrained
        if Path(pretrained).is_dir():
            pretrained = str(Path(pretrained).resolve())
        names = [field.name for field in fields(ModelSettings) if field.name not in ("pretrained", "mode")]
        common = {name: getattr(self, name) for name in names}
        modes: tuple[str | None, ...] = self.mode or (None,)
        return [ModelSettings.from_dict({"pretrained": pretrained, "mode": mode, **common}) for mode in modes]


def _typed(path: Path, key: str, value: Any) -> Any:
    """A value as `SuiteConfig` holds it: names as a tuple, folders as paths, rates as numbers.

    YAML turns what a user writes into lists, mappings, dates and numbers: what can't be meant is an error here.
    """
    if key in _POSITIVE:
        return value  # `check` looks at them
    if key in ("benchmarks", "mode"):
        names = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(name, str) for name in names):
            return tuple(names)
        raise UserError(f"{path}: `{key}` has to be a name or a list of names, not {value!r}")
    if key in ("vision_keep_rate", "text_keep_rate", "random_seed"):
        if type(value) is int or (type(value) is float and key != "random_seed"):
            return value if key == "random_seed" else float(value)
        raise UserError(f"{path}: `{key}` has to be a number, not {value!r}")
    if not isinstance(value, (str, Path)):
        raise UserError(f"{path}: `{key}` has to be text, not {value!r}")
    return Path(value) if key in ("data", "images", "output") else str(value)
