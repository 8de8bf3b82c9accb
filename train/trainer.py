"""transformers' Trainer for Dynamic-LLaVA: its loss, its two learning rates, its temperature, its log."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from dynllava_plugin.sparsity.selection import last_answer, tau_at
from train.arguments import RecipeArguments
from train.noise import gumbel_noise

PREDICTORS = ("image_predictor", "text_predictor")
FROZEN = ("vision_tower", "multi_modal_projector")


class DynamicLlavaTrainer(Trainer):
    """Minimises `lm_loss + keep_loss_weight * (image_keep_loss + text_keep_loss)` over a global batch.

    The cross entropy is the mean over all labelled tokens of the global batch, the keep losses over all its
    samples, however many processes and micro-batches it takes. (Trainer alone weights every term by tokens.)
    """

    args: RecipeArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `compute_loss` weights micro-batches itself: `training_step` must not divide by their number again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._batch_samples = torch.zeros(())
        self._sums: dict[str, torch.Tensor] = {}
        self._rates: list[float] = []
        self.model.config.use_cache = True  # Trainer switches it off, and it would be saved so
        self.add_callback(Temperature(self.args.tau_start, self.args.tau_end))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group of parameters for the LLM, one for the predictors; what needs no gradient is left out."""
        if self.optimizer is None:  # type: ignore[has-type]
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            predictors = [p for n, p in named if any(part in n for part in PREDICTORS)]
            llm = [p for n, p in named if not any(part in n for part in PREDICTORS)]
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {"params": llm, "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay},
                    {
                        "params": predictors,
                        "lr": self.args.predictor_learning_rate,
                        "weight_decay": self.args.weight_decay,
                    },
                ],
                **settings,
            )
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of one optimiser step and its number of labels; remembers that of samples."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        labels = sum(int(count_labels(batch["labels"])) for batch in batches)
        samples = sum(len(batch["sample"]) for batch in batches)
        totals = torch.tensor([labels, samples], device=self.args.device)
        totals = self.accelerator.reduce(totals, reduction="sum")
        self._batch_samples = totals[1]
        return batches, totals[0]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the global batch's loss."""
        samples = inputs.pop("sample")
        labels = inputs["labels"]
        image_tokens = inputs["input_ids"] == self.model.config.image_token_id
        noise = gumbel_noise(self.args.seed, self.state.global_step, samples, image_tokens, labels)
        # The model divides by the labels of the whole global batch, so that micro-batches add up.
        outputs = model(**inputs, gumbel_noise=noise, num_items_in_batch=num_items_in_batch)
        share = len(samples) / self._batch_samples
        loss = outputs.lm_loss
        for keep_loss in (outputs.image_keep_loss, outputs.text_keep_loss):
            if keep_loss is not None:  # mode "image" has none for text
                loss = loss + self.model.config.sparsity.keep_loss_weight * share * keep_loss
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._record(outputs, samples, image_tokens, labels, num_items_in_batch)
        # Gradients are averaged over processes; the parts must be added.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(
        self,
        outputs: Any,
        samples: torch.Tensor,
        image_tokens: torch.Tensor,
        labels: torch.Tensor,
        items: Any,
    ) -> None:
        """Add this micro-batch to the sums behind the next line of the log; nothing waits for the device."""
        number = torch.tensor(float(len(samples)), device=labels.device)
        image_rate = outputs.image_keep.sum(1) / image_tokens.sum(1).clamp(min=1)
        parts = {
            "labels": count_labels(labels),
            "lm_loss": outputs.lm_loss * items,
            "samples": number,
            "image_keep_loss": outputs.image_keep_loss * number,
            "image_keep_rate": image_rate.sum(),
        }
        if outputs.text_keep is not None:
            answer_length = last_answer(labels).sum(1)
            counted = answer_length >= self.model.config.sparsity.min_text_length
            text_rate = outputs.text_keep.sum(1) / answer_length.clamp(min=1)
            parts["text_keep_loss"] = outputs.text_keep_loss * number
            parts["long_answers"] = counted.sum()
            parts["text_keep_rate"] = (text_rate * counted).sum()
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + part.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to Trainer's log: loss terms and keep rates since the last, temperature, learning rates."""
        if "loss" in logs and self._sums:
            names = list(self._sums)
            values = self.accelerator.reduce(
                torch.stack([self._sums[name] for name in names]), reduction="sum"
            )
            sums = dict(zip(names, values.tolist(), strict=True))
            self._sums = {}
            logs["lm_loss"] = sums["lm_loss"] / max(sums["labels"], 1)
            for name in ("image_keep_loss", "text_keep_loss", "image_keep_rate"):
                if name in sums:
                    logs[name] = sums[name] / sums["samples"]
            if sums.get("long_answers"):
                logs["text_keep_rate"] = sums["text_keep_rate"] / sums["long_answers"]
            logs["tau"] = self.model.gumbel_tau
            logs.pop("learning_rate", None)
            logs["lr_llm"], logs["lr_predictor"] = self._rates
        super().log(logs, start_time)


class Temperature(TrainerCallback):
    """Sets the model's Gumbel-softmax temperature before each optimiser step."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """tau = start * (end / start) ** (step / max_steps)."""
        model.gumbel_tau = tau_at(state.global_step, state.max_steps, self.start, self.end)


def count_labels(labels: torch.Tensor) -> torch.Tensor:
    """How many predicted tokens [B, L] labels ask for."""
    return (labels[:, 1:] != -100).sum()


def freeze(model: Any) -> None:
    """Train the LLM and the predictors; the vision tower and the projector stay as they are."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN))
