"""What to evaluate: a checkpoint, where it runs, and the sparsity settings laid over the checkpoint's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
from dynllava_plugin.evaluation.options import flag, option
from dynllava_plugin.sparsity.config import IMAGE_POLICIES, MODES, SparsityConfig

DEFAULT_CHECKPOINT = "Osilly/Dynamic-LLaVA-7B"
SPARSITY_KEYS = ("mode", "vision_keep_rate", "text_keep_rate", "image_policy", "random_seed", "policy")
AUTO = "auto"  # batch size
PROMPTS = ("llava", "kit")
# The harnesses' own command lines for our model, as modules to run with ``python -m``.
_MODULES = {
    LMMS_EVAL: "dynllava_plugin.evaluation.lmms_eval.command",
    VLMEVALKIT: "dynllava_plugin.evaluation.vlmevalkit.command",
}
# How a model is loaded and asked, where not as its checkpoint says.
_LOADING_KEYS = ("dtype", "attn_implementation", "quantization")
_ASKING_KEYS = ("system_prompt", "min_pixels", "max_pixels", "video_frames")
# Where a checkpoint lies and runs, on which no answer depends.
PLACES = ("pretrained", "device")


@dataclass(frozen=True)
class RunSettings:
    """How a benchmark's questions are asked, in whichever harness."""

    limit: int | None = option("questions of each benchmark (default: all)", int, least=1)
    batch_size: int | str = option(
        "questions answered at once; in float32 it never changes an answer; auto takes the most that fit (default: 8)",
        int, 8, least=1, word=AUTO,
    )  # fmt: skip
    prompts: str = option(
        "who words VLMEvalKit's questions for VizWiz, POPE, MME and multiple choice: LLaVA-1.5's evaluation or the kit "
        "(default: llava)",
        default=PROMPTS[0],
        choices=PROMPTS,
    )

    def labels(self) -> list[str]:
        """Return what is asked otherwise than usual, as parts of a folder's name."""
        limit = [f"limit-{self.limit}"] if self.limit else []
        return limit + ([f"prompts-{self.prompts}"] if self.prompts != PROMPTS[0] else [])


@dataclass(frozen=True)
class ModelSettings:
    """A checkpoint and how it is run; ``None`` means: as the checkpoint (or `load_model`) says."""

    pretrained: str = option(
        f"checkpoint folder, hub id, or tiny (default: {DEFAULT_CHECKPOINT})",
        default=DEFAULT_CHECKPOINT,
        metavar="CHECKPOINT",
    )
    device: str | None = option("cpu, cuda, cuda:0, ... (default: the GPU where there is one)")
    dtype: str | None = option("float32, bfloat16, float16 (default: the checkpoint's)")
    attn_implementation: str | None = option("sdpa, eager, flash_attention_2 (default: transformers' choice)")
    quantization: str | None = option(
        "8bit or 4bit: the LLM's weights, through bitsandbytes", choices=("8bit", "4bit")
    )
    mode: str | None = option(f"{'|'.join(MODES)}: what is dropped (default: the checkpoint's)")
    vision_keep_rate: float | None = option("share of image tokens that stay, in (0, 1]", float)
    text_keep_rate: float | None = option("written down with the run; how much text stays was learned", float)
    image_policy: str | None = option(
        f"{'|'.join(IMAGE_POLICIES)}: who chooses the image tokens", choices=IMAGE_POLICIES
    )
    random_seed: int | None = option("of what is chosen by chance", int)
    policy: str | None = option(
        "instead of mode and image_policy, with its arguments: policy=fastv,k=3,r=0.75"
    )
    system_prompt: str | None = option("what a chat template begins with instead of its own (not LLaVA-1.5)")
    min_pixels: int | None = option(
        "pixels an image is resized to at least, where the processor has such limits (Qwen)", int, least=1
    )
    max_pixels: int | None = option("and at most", int, least=1)
    video_frames: int | None = option(
        "frames of a video that are looked at, evenly spaced (default: 32)", int, least=1
    )

    def __post_init__(self) -> None:
        from dynllava_plugin.policies.registry import check_policy, policy_changes

        # A wrong value is named here, before a checkpoint of many gigabytes is read.
        check_policy(SparsityConfig().replace(**policy_changes(self.sparsity())))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSettings:
        """Return settings from ``key=value`` pairs; with ``policy``, keys that aren't settings are the policy's arguments.

        Raises
        ------
        UserError
            Naming a key that doesn't exist or a value out of range.
        """
        from dynllava_plugin.policies.registry import describe

        known = [setting.name for setting in fields(cls)]
        given = {key: value for key, value in values.items() if value is not None}
        unknown = sorted(set(given) - set(known))
        if given.get("policy") is not None:
            arguments = {key: given.pop(key) for key in values if key in unknown}
            given["policy"] = describe(str(given["policy"]), arguments)
        elif unknown:
            raise UserError(f"{unknown[0]}: no such model argument; known are {', '.join(known)}, batch_size")
        for key in ("vision_keep_rate", "text_keep_rate"):
            # lmms-eval turns "1" into 1 and, with some versions, into True: a rate of 1 keeps everything.
            if key in given and isinstance(given[key], (bool, int)):
                given[key] = float(given[key])
        if "pretrained" in given:
            given["pretrained"] = str(given["pretrained"])
        return cls(**given)

    def check(self) -> None:
        """Raise `UserError` for what loading the checkpoint would refuse, without reading its weights."""
        from dynllava_plugin.model.checkpoints import check_settings

        check_settings(
            self.pretrained,
            device=self.device,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            **self.sparsity(),
        )

    def sparsity(self) -> dict[str, Any]:
        """Return the given overrides only, as keyword arguments of `load_model`."""
        return {key: getattr(self, key) for key in SPARSITY_KEYS if getattr(self, key) is not None}

    def given(self) -> dict[str, Any]:
        """Return what isn't left to the checkpoint or `load_model`."""
        return {key: value for key, value in self.to_dict().items() if value is not None}

    def labels(self) -> list[str]:
        """Return all that is given beside checkpoint and device, as parts of a folder's name; of a text a few digits."""
        given = self.given()
        if "system_prompt" in given:
            given["system_prompt"] = hashlib.sha256(given["system_prompt"].encode()).hexdigest()[:8]
        loading = [str(given[key]) for key in _LOADING_KEYS if key in given]
        sparsity, asking = (
            [f"{key}-{given[key]}" for key in keys if key in given]
            for keys in (sorted(SPARSITY_KEYS), _ASKING_KEYS)
        )
        return [*sparsity, *loading, *asking]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, JSON-ready."""
        return asdict(self)

    @property
    def checkpoint_name(self) -> str:
        """Return a short name for tables and folders: the last part of a path, all of a hub id."""
        path = Path(self.pretrained)
        return path.resolve().name if path.exists() else self.pretrained.rstrip("/")

    def slug(self) -> str:
        """Return a folder name that differs wherever checkpoint or settings differ, e.g. ``tiny_mode-full``.

        A folder's name is followed by a few digits of its files' sizes and times: a checkpoint that was
        trained again under the same name must not meet the old one's half-done predictions.
        """
        parts = [self.checkpoint_name]
        path = Path(self.pretrained)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
            facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            parts.append(hashlib.sha256(f"{path.resolve()} {facts}".encode()).hexdigest()[:8])
        return as_folder_name([*parts, *self.labels()])


def as_folder_name(parts: list[str]) -> str:
    """Return parts of a folder's name as one."""
    return re.sub(r"[^\w.=-]+", "-", "_".join(parts))


def settings_named(*names: str) -> list[Field[Any]]:
    """Return the settings of these names, a run's or a model's, for a command that hasn't all of them."""
    return [setting for setting in (*fields(RunSettings), *fields(ModelSettings)) if setting.name in names]


def arguments_help() -> str:
    """Return a line for each setting, its name and what it is, as ``--model_args`` of a harness takes them."""
    lines = [f"  {setting.name:20} {setting.metadata['help']}" for setting in fields(ModelSettings)]
    return "\n".join(["--model_args of --model dynllava, as name=value,name=value:", *lines])


def module_and_arguments(
    harness: str,
    settings: ModelSettings,
    tasks: Sequence[str],
    batch_size: int | str,
    output: Path,
    limit: int | None,
) -> list[str]:
    """Return what follows ``python -m``: `tasks` of `harness`, their results and saved answers in `output`."""
    given = settings.given()
    if harness == LMMS_EVAL:
        device = given.pop("device", None)
        asked = ["--model_args", ",".join(f"{key}={value}" for key, value in given.items()), "--log_samples"]
        asked += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(output)]
        asked += ["--device", device] if device else []
    else:
        asked = [part for key, value in given.items() for part in (flag(key), str(value))]
        asked += ["--data", *tasks, "--batch-size", str(batch_size), "--work-dir", str(output)]
    return [_MODULES[harness], "--model", "dynllava", *asked, *(["--limit", str(limit)] if limit else [])]
