"""Settings of the sparsification (Dynamic-LLaVA, arXiv 2412.00876, sections 3.2-3.3 and appendix A.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dynllava_plugin.errors import UserError

MODES = ("full", "image", "image_text")
IMAGE_POLICIES = ("learned", "random")
Check = Callable[[str, Any], None]


def number(problem: str, fits: Callable[[Any], bool], *kinds: type) -> Check:
    """Return a check of a value, which raises `UserError` with the `problem` unless it is a number of `kinds` that `fits`.

    Before it stands what the value is called: "fastv: r=" or "vision_keep_rate: ".
    """

    def check(called: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, kinds or (int, float)) or not fits(value):
            raise UserError(f"{called}{value!r} is {problem}")

    return check


count = number("not a positive integer", lambda value: value >= 1, int)
from_zero = number("not an integer from 0", lambda value: value >= 0, int)
share = number("outside (0, 1]", lambda value: 0 < value <= 1)
weight = number("not a finite number from 0", lambda value: 0 <= value < math.inf)


def argument(default: Any, check: Check) -> Any:
    """Return a dataclass field that `check` looks at."""
    return field(default=default, metadata={"check": check})


@dataclass
class SparsityConfig:
    """What is dropped, where, and how large the predictors are. Defaults are the paper's.

    Raises `UserError` for a value outside its range.
    """

    # "full": nothing is dropped, "image": image tokens (Dynamic-LLaVA_I), "image_text": also output text (Dynamic-LLaVA_I|T)
    mode: str = "image_text"
    # who ranks the image tokens: the image predictor, "learned", or chance, "random", a control seeded by image and `random_seed`
    image_policy: str = "learned"
    random_seed: int = argument(0, from_zero)
    # a name of `dynllava_plugin.policies`, several joined by "+", with arguments; stands for `mode` and `image_policy` at inference
    policy: str | None = None
    policy_args: dict[str, Any] = field(default_factory=dict)
    # l: layers 0..l-1 see every token, layers l.. the reduced context; 1 <= l < number of layers
    sparse_layer: int = argument(2, count)
    # r_I and r_OT of Eq. 10, in (0, 1]: at inference floor(r_I * N) tokens of each image stay, at least one; r_OT is a target of
    # training only
    vision_keep_rate: float = argument(0.2, share)
    text_keep_rate: float = argument(0.5, share)
    # LEN_OT, tokens: shorter answers are kept whole in training
    min_text_length: int = argument(50, from_zero)
    keep_loss_weight: float = argument(100.0, weight)  # lambda, the weight of the keep losses
    # width c, attention heads, MLP width and ViT blocks of the image predictor; the text predictor shares c
    predictor_dim: int = argument(512, count)
    predictor_heads: int = argument(8, count)
    predictor_ffn_dim: int = argument(2048, count)
    predictor_layers: int = argument(2, count)
    # whether the checkpoint has a predictor for output text, without which `mode` is "full" or "image", and for the text of the
    # prompt's last question
    text_predictor: bool = True
    prompt_predictor: bool = False
    # the latter's target, in (0, 1]; 1 leaves prompt text alone, the paper's method (0.7 is its Table 9). At inference a rate below
    # 1 says that the predictor decides, token by token, in the modes "image" and "image_text"
    prompt_keep_rate: float = argument(1.0, share)
    min_prompt_length: int = argument(10, from_zero)  # tokens: shorter questions are kept whole in training
    # token ids of "USER:" and "ASSISTANT:", between which the last question stands: Vicuna's
    question_marks: tuple[tuple[int, ...], tuple[int, ...]] = (
        (11889, 29901),
        (319, 1799, 9047, 13566, 29901),
    )
    # (layer, rate) of further gates of the image tokens, each with a predictor of its own: which share of what reaches it stays.
    # The first gate is at `sparse_layer`, its share `vision_keep_rate`
    later_gates: tuple[tuple[int, float], ...] = ()
    # (low, high): each sample of training has a keep rate of its own from this range, which the image predictors are told: one
    # checkpoint for every budget. `vision_keep_rate` is what it is used at
    vision_keep_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self, num_layers: int | None = None) -> None:
        """Check every field; `num_layers` of the LLM bounds `sparse_layer` where it is known."""
        if self.mode not in MODES:
            raise UserError(f"mode: unknown value {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.image_policy not in IMAGE_POLICIES:
            raise UserError(
                f"image_policy: unknown value {self.image_policy!r}; choose one of {', '.join(IMAGE_POLICIES)}"
            )
        if self.policy is not None and not isinstance(self.policy, str):
            raise UserError(f"policy: {self.policy!r} is not a policy's name")
        for name, type_ in (("policy_args", dict), ("text_predictor", bool), ("prompt_predictor", bool)):
            if not isinstance(getattr(self, name), type_):
                raise UserError(f"{name}: {getattr(self, name)!r} is not a {type_.__name__}")
        if self.policy_args and self.policy is None:
            raise UserError(
                f"{next(iter(self.policy_args))}: an argument of a policy, but no policy is named"
            )
        if self.mode == "image_text" and not self.text_predictor:
            raise UserError(
                "mode: 'image_text' needs an output-text predictor, which this checkpoint lacks; use 'image'"
            )
        for one in fields(self):
            if check := one.metadata.get("check"):
                value = getattr(self, one.name)
                # JSON writes Python's own numbers.
                if hasattr(value, "item") and not getattr(value, "shape", ()):
                    setattr(self, one.name, value := value.item())
                check(f"{one.name}: ", value)
        if self.predictor_dim % 4 or self.predictor_dim % self.predictor_heads:
            raise UserError(
                f"predictor_dim: {self.predictor_dim} must be divisible by 4 and by predictor_heads={self.predictor_heads}"
            )
        self._check_gates(num_layers)

    @property
    def drops_prompt(self) -> bool:
        """Return whether text of the prompt's last question may be dropped."""
        return (
            self.prompt_predictor
            and self.prompt_keep_rate < 1
            and self.mode != "full"
            and self.policy is None
        )

    @property
    def image_gates(self) -> tuple[tuple[int, float], ...]:
        """Return (layer, rate) of every gate of the image tokens: which share of what reaches it stays."""
        return ((self.sparse_layer, self.vision_keep_rate), *self.later_gates)

    def _check_gates(self, num_layers: int | None) -> None:
        """Check the later gates, the range of keep rates and the question's marks; JSON has them as lists."""
        try:
            user, assistant = self.question_marks
            self.question_marks = tuple(map(int, user)), tuple(map(int, assistant))
            self.later_gates = tuple((int(layer), float(rate)) for layer, rate in self.later_gates)
            if self.vision_keep_range is not None:
                low, high = self.vision_keep_range
                self.vision_keep_range = float(low), float(high)
        except (TypeError, ValueError):
            raise UserError(
                f"later_gates: {self.later_gates!r}, vision_keep_range: {self.vision_keep_range!r}, question_marks: "
                f"{self.question_marks!r}: must be pairs of (layer, rate), (low, high), and two lists of token ids"
            ) from None
        if self.prompt_keep_rate < 1 and not self.prompt_predictor:
            raise UserError(
                f"prompt_keep_rate: {self.prompt_keep_rate} needs a predictor for prompt text, which this checkpoint lacks"
            )
        layers = [layer for layer, _ in self.image_gates]
        if layers != sorted(set(layers)) or not all(0.0 < rate <= 1.0 for _, rate in self.later_gates):
            raise UserError(
                f"later_gates: {self.later_gates} behind layer {self.sparse_layer}: layers must rise, rates be in (0, 1]"
            )
        if num_layers is not None and layers[-1] >= num_layers:
            raise UserError(
                f"sparse_layer: {layers[-1]} is outside the model, which has layers 0..{num_layers - 1}"
            )
        if self.vision_keep_range is not None:
            low, high = self.vision_keep_range
            if not 0.0 < low < high <= 1.0:
                raise UserError(f"vision_keep_range: {low}:{high} does not rise in (0, 1]")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsityConfig:
        """Return the inverse of `to_dict`; an unknown key is a `UserError` that names it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(
                f"{unknown[0]}: no such sparsity setting; known are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)

    def replace(self, **changes: Any) -> SparsityConfig:
        """Return a validated copy with `changes` applied; the latest choice counts, of `policy` or of `mode` and `image_policy`."""
        if "policy" in changes:
            changes = {"policy_args": {}, **changes}
        elif "mode" in changes or "image_policy" in changes:
            changes = {"policy": None, "policy_args": {}, **changes}
        return type(self).from_dict({**self.to_dict(), **changes})
