"""transformers' Trainer for models with predictors: its loss, its two learning rates, its temperature, its checkpoints."""

from __future__ import annotations

import re
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import Trainer, TrainerCallback

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.modeling import SparseVLM
from dynllava_plugin.model.token_layout import question_mask
from dynllava_plugin.sparsity.objective import lm_loss
from dynllava_plugin.sparsity.selection import last_answer, tau_at
from train import checkpoints
from train.adapters import PREDICTORS, is_adapted, trained_predictors
from train.arguments import RecipeArguments
from train.interruption import Interruption, ShieldedWorker
from train.measures import Measures, count_labels
from train.noise import gumbel_noise, keep_rates
from train.sampling import EpochSampler

ABSURD = (
    1e4  # a cross entropy, per label, that no text has: a label that can't be predicted, a damaged weight
)
# Of a model's names in every family; the rest is vision tower, projector (merger) and what stands between tiles.
TRAINED = ("model.language_model.", "lm_head.")
PROJECTOR = re.compile(r"^model\.(multi_modal_projector|visual\.(deepstack_)?merger)")


class DynamicLlavaTrainer(Trainer):
    """Minimises `lm_loss + keep_loss_weight * (image_keep_loss + text_keep_loss)` over a global batch.

    The keep losses are means over all samples of the global batch; the cross entropy is the mean over all its labelled
    tokens, however many processes and micro-batches it takes, or (`--loss_average batches`) the mean of the micro-batches'
    own means. (Trainer alone weights every term by tokens.)

    Parameters
    ----------
    interruption : Interruption, optional
        Where any process was asked to stop, all save after the step they are in and stop.
    evaluation : HeldOut, optional
        What `evaluate` measures.
    *args, **kwargs
        Trainer's.
    """

    args: RecipeArguments

    def __init__(
        self, *args: Any, interruption: Interruption | None = None, evaluation: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # `compute_loss` weights micro-batches itself: `training_step` must not divide by their number again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.dynamic = sparse_model(self.model)
        if self.is_fsdp_enabled:  # whatever the family, its LLM's layers are what is wrapped
            layer = type(self.dynamic.model.language_model.layers[0]).__name__
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = [layer]
            # accelerate's own under --bf16 would round what is float32 on purpose: Gumbel noise, losses, sums of gradients.
            # So nothing is cast here: autocast computes in bfloat16, as it does around DDP.
            plugin.mixed_precision_policy = MixedPrecisionPolicy()
        self.interruption = interruption or Interruption()
        self.evaluation = evaluation
        self.measures = Measures(self.dynamic.config.sparsity)
        self.stopping = False
        self._batch_samples = self._micro_batches = torch.zeros(())
        self._rates: list[float] = []
        self._saving = False
        # Trainer sets it beside the LLM's own: it would be saved, and handed to the vision tower's layers.
        vars(self.dynamic.config).pop("use_cache", None)
        self.add_callback(StepRules(self))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer with one group of parameters for the LLM, one for the predictors; what needs no gradient is left out."""
        if self.optimizer is None:  # type: ignore[has-type]
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            predictors = [p for n, p in named if any(part in n for part in PREDICTORS)]
            llm = [p for n, p in named if not any(part in n for part in PREDICTORS)]
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = [(llm, self.args.learning_rate), (predictors, self.args.predictor_learning_rate)]
            decay = self.args.weight_decay
            groups = [{"params": group, "lr": rate, "weight_decay": decay} for group, rate in rates if group]
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = dataset.lengths() if grouped else None
        self.sampler = EpochSampler(len(dataset), self.args.global_batch_size, seed, lengths)
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed behind the last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Trainer's, with workers that leave SIGTERM to this process."""
        loader = super().get_train_dataloader()
        loader.worker_init_fn = ShieldedWorker(loader.worker_init_fn)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """Return the micro-batches of one optimiser step and its number of labels; remembers that of samples."""
        batches = list(islice(epoch_iterator, num_batches))
        labels = sum(int(count_labels(batch["labels"])) for batch in batches)
        samples = sum(len(batch["sample"]) for batch in batches)
        # A reason to stop (SIGTERM, too many bad samples) travels with the counts: every process hears of it before the same step.
        skipped = getattr(self.train_dataset, "skipped", None)
        stop = self.interruption.requested or (skipped is not None and skipped.too_many())
        counts = [labels, samples, len(batches), int(stop)]
        totals = self.accelerator.reduce(torch.tensor(counts, device=self.args.device), reduction="sum")
        _, self._batch_samples, self._micro_batches, stopping = totals
        self.stopping = bool(stopping)
        # No label at all, where every sample has something that LLaVA can't label.
        return batches, totals[0].clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's part of the global batch's loss.

        Raises
        ------
        UserError
            It is not finite, or so large that no text explains it; the message names the samples.
        """
        samples = inputs.pop("sample")
        labels = inputs["labels"]
        image_tokens = inputs["input_ids"] == self.dynamic.config.image_token_id
        sparsity, drawn = self.dynamic.config.sparsity, (self.args.seed, self.state.global_step, samples)
        question = None
        if sparsity.drops_prompt:
            valid, answer = inputs["attention_mask"].bool(), last_answer(labels)
            question = question_mask(
                inputs["input_ids"], valid, image_tokens, answer, sparsity.question_marks
            )
        gates = len(sparsity.image_gates)
        inputs["gumbel_noise"] = gumbel_noise(*drawn, image_tokens, labels, gates, question)
        if sparsity.vision_keep_range:
            inputs["keep_rates"] = keep_rates(*drawn, *sparsity.vision_keep_range)
        # The model divides by the labels of the whole global batch, so that micro-batches add up; else by its own.
        over_labels = self.args.loss_average == "labels"
        with self.accelerator.autocast():  # which accelerate leaves out around FSDP2
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch if over_labels else None)
        share = len(samples) / self._batch_samples
        loss = outputs.lm_loss if over_labels else outputs.lm_loss / self._micro_batches
        for keep_loss in (outputs.image_keep_loss, outputs.text_keep_loss, outputs.prompt_keep_loss):
            if keep_loss is not None:  # mode "image" has none for text, most runs none for the prompt
                loss = loss + sparsity.keep_loss_weight * share * keep_loss
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        tokens = inputs["attention_mask"].sum()
        lm_sum = outputs.lm_loss * num_items_in_batch if over_labels else outputs.lm_loss
        weight = count_labels(labels) if over_labels else torch.ones_like(lm_sum)
        if not (torch.isfinite(loss) & (lm_sum < ABSURD * weight.clamp(min=1))):
            raise UserError(self._spoiled(loss, outputs.logits, labels, samples))
        self.measures.add(outputs, samples, image_tokens, labels, tokens, (lm_sum, weight), question)
        # Gradients are averaged over processes; the parts must be added.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip the predictors' gradients and the others', each by itself; return the norm of all before.

        The predictors' are the larger: together, they would set the scale of the LLM's. DeepSpeed has clipped them already, together.
        """
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        groups: tuple[list[Any], list[Any]] = ([], [])
        for name, parameter in model.named_parameters():
            groups[any(part in name for part in PREDICTORS)].append(parameter)
        norms = [self.accelerator.clip_grad_norm_(group, self.args.max_grad_norm) for group in groups]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).norm()

    def _spoiled(
        self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, samples: torch.Tensor
    ) -> str:
        name = getattr(self.train_dataset, "name", str)
        logits = logits.detach()
        own = [float(lm_loss(logits[row : row + 1], labels[row : row + 1])) for row in range(len(samples))]
        at_fault = [index for index, value in zip(samples.tolist(), own, strict=True) if not value < ABSURD]
        named = "; ".join(name(index) for index in at_fault or samples.tolist())
        return (
            f"step {self.state.global_step + 1}: the loss is {loss.item()}, so the run stops before it spoils the "
            f"weights; {'it is that of' if at_fault else 'the batch was'} {named}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to Trainer's log: what `Measures` has since the last line, temperature, learning rates."""
        if "loss" in logs:
            logs |= self.measures.take(self.accelerator, self.state.global_step, self.state.max_steps)
            logs["tau"] = self.dynamic.gumbel_tau
            logs.pop("learning_rate", None)
            if self._rates:
                logs["lr_predictor"] = self._rates[-1]
            if len(self._rates) > 1:
                logs["lr_llm"] = self._rates[0]
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Accuracy, perplexity and kept tokens on the held-out samples, through the evaluation's engine."""
        sharded = self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        if self.is_fsdp_enabled:
            # Its root gathers its weights for `forward` (and, by Trainer, `generate`) only.
            assert isinstance(self.dynamic, FSDPModule)  # not under an adapter: refused before training
            for method in ("score_details", "get_image_features"):
                if method not in vars(self.dynamic):
                    register_fsdp_forward_method(self.dynamic, method)
        with self.measures.paused():
            metrics = self.evaluation.measure(self.dynamic, self.processing_class, self.accelerator, sharded)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, under the names that the model has in memory: going on reads no others."""
        model, how = self.dynamic, {"save_original_format": False}
        if is_adapted(self.model):  # else peft asks a hub whether the base's embeddings were resized
            model, how = self.model, {"save_embedding_layers": False}
        model.save_pretrained = partial(model.save_pretrained, **how)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoints.SAVING) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save into a folder beside, seal it, move it into place: a checkpoint is there whole or not at all."""
        output_dir = Path(super()._get_output_dir(trial))
        folder = output_dir / checkpoints.SAVING / f"checkpoint-{self.state.global_step}"
        writer = self.args.should_save
        with (
            self.measures.paused(),
            checkpoints.saying_what_is_left(folder.name, output_dir, folder.parent, delete=writer),
        ):
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self.accelerator.wait_for_everyone()
            if writer:
                checkpoints.seal(folder)
                checkpoints.publish(folder, output_dir, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()


class StepRules(TrainerCallback):
    """What happens around an optimiser step: the temperature before, the end of an interrupted run after."""

    def __init__(self, trainer: DynamicLlavaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the log's clock; of a resumed run, log, save and evaluate as often as this command says, not the one before."""
        self.trainer.measures.start(state.global_step)
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch's order of samples; accelerate's wrappers don't always pass the epoch on."""
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """tau = start * (end / start) ** (step / max_steps)."""
        tau = tau_at(state.global_step, state.max_steps, args.tau_start, args.tau_end)
        self.trainer.dynamic.gumbel_tau = tau

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop where a process was asked to, without an evaluation first: there may be seconds left."""
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def sparse_model(model: Any) -> SparseVLM:
    """Return the model with predictors inside whatever wraps it (an adapter's model, a compiled one)."""
    return next(part for part in model.modules() if isinstance(part, SparseVLM))


def freeze(model: Any, train_projector: bool = False, train_llm: bool = True) -> None:
    """Train the predictors that are used, the LLM unless told otherwise, the projector where asked; all else stays as it is.

    DDP waits for every gradient, so that what is never used must not ask for one.
    """
    used, unused = trained_predictors(model), set(PREDICTORS) - set(trained_predictors(model))
    for name, parameter in model.named_parameters():
        wanted = name.startswith(TRAINED) if train_llm else any(part in name for part in used)
        wanted |= train_projector and PROJECTOR.search(name) is not None
        parameter.requires_grad_(wanted and not any(part in name for part in unused))
