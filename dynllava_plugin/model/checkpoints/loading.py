"""`load_model`: one call for every layout."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import read_json
from dynllava_plugin.model.checkpoints.adapters import base_of, is_adapter, merge_adapter
from dynllava_plugin.model.checkpoints.building import build, empty_model
from dynllava_plugin.model.checkpoints.layouts import (
    FAMILY,
    ORIGINAL,
    OWN,
    PUBLISHED,
    layout_of,
    read_config,
    vision_folder,
)
from dynllava_plugin.model.checkpoints.placement import find_device, find_dtype, find_quantization
from dynllava_plugin.model.checkpoints.processors import read_processor, read_tokenizer
from dynllava_plugin.model.checkpoints.sources import HUB_ID, find_checkpoint
from dynllava_plugin.model.checkpoints.weights import (
    PROMPT_PREDICTOR,
    VISION,
    check_depth,
    is_added,
    read_ahead,
    read_file,
    read_weights,
    weight_files,
)
from dynllava_plugin.model.configuration import PREFIX
from dynllava_plugin.model.families import FAMILIES
from dynllava_plugin.model.families.llava import DynamicLlavaConfig
from dynllava_plugin.model.families.projectors import PACKED_STATES, TOKENPACKER
from dynllava_plugin.model.modeling import SparseVLM
from dynllava_plugin.model.prompts import IMAGE_TOKEN
from dynllava_plugin.policies.registry import check_policy, policy_changes

logger = logging.getLogger(__name__)

PLACING = ("device", "dtype", "attn_implementation", "quantization")  # load_model's arguments beside settings
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def load_model(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    **sparsity_overrides: Any,
) -> tuple[SparseVLM, Any]:
    """Load a checkpoint of any family and layout: its model with gates between the LLM's layers, and its processor.

    Parameters
    ----------
    path_or_hub_id : str or Path
        A folder, a hub id, or ``"tiny"`` (the bundled model). Stock checkpoints of LLaVA-NeXT (-Video), LLaVA-OneVision,
        Qwen2-VL, Qwen2.5-VL, Qwen3-VL (with experts too), InternVL (transformers' layout) and Mistral3; LLaVA-1.5 as
        published Dynamic-LLaVA, original, llava-hf; and what `save_pretrained` wrote. They are told apart by their
        config.json. A folder with a LoRA adapter (and predictors) is merged into the checkpoint that it names.
    device : str or torch.device, optional
        Default: the GPU where there is one, else the CPU.
    dtype : str or torch.dtype, optional
        Default: the checkpoint's.
    attn_implementation : str, optional
        ``"eager"``, ``"sdpa"`` or ``"flash_attention_2"``; default: transformers' choice.
    quantization : "8bit" | "4bit", optional
        Weights of so many bits, through bitsandbytes; predictors and output matrix stay as they are.
    **sparsity_overrides
        Fields of `SparsityConfig`, e.g. ``mode="full"`` or ``vision_keep_rate=0.1``; or a policy with its arguments,
        ``policy="fastv", k=3, r=0.75`` (also as one text, ``policy="fastv,k=3,r=0.75"``).

    Returns
    -------
    model : the family's class, e.g. DynamicLlavaForConditionalGeneration
        In eval mode. A checkpoint without predictors gets fresh ones, said in one line of the log.
    processor : DynamicLlavaProcessor for LLaVA-1.5, the family's own processor otherwise
        Padding on the left.

    Raises `UserError`, one line that names the file or setting: no such checkpoint, an unknown layout, missing, extra
    or damaged weights, a setting out of range.
    """
    placing = dict(zip(PLACING, (device, dtype, attn_implementation, quantization), strict=True))
    model, processor = load_to_train(path_or_hub_id, **placing, **sparsity_overrides)
    _say_what_is_fresh(path_or_hub_id, model)
    return model, processor


def load_to_train(path_or_hub_id: str | Path, **arguments: Any) -> tuple[SparseVLM, Any]:
    """Return what `load_model` does, with its arguments, without a line about fresh predictors: they are there to be trained."""
    placing = [arguments.pop(name, None) for name in PLACING]
    checkpoint = _Checkpoint(path_or_hub_id, arguments)
    processor = checkpoint.processor()
    return checkpoint.model(*placing), processor


def load_without_processor(path_or_hub_id: str | Path, **arguments: Any) -> SparseVLM:
    """Return `load_model`'s model, with its arguments, also of a checkpoint that has no tokenizer."""
    placing = [arguments.pop(name, None) for name in PLACING]
    model = _Checkpoint(path_or_hub_id, arguments).model(*placing)
    _say_what_is_fresh(path_or_hub_id, model)
    return model


def check_settings(path_or_hub_id: str | Path, **arguments: Any) -> None:
    """Raise the `UserError` that `load_model` would, by the checkpoint's small files and the headers of its weights.

    Nothing is built, and of a hub id no weights are fetched.
    """
    device, dtype, attention, quantization = [arguments.pop(name, None) for name in PLACING]
    find_device(device)
    checkpoint = _Checkpoint(path_or_hub_id, arguments, weights=False)
    number_type = find_dtype(dtype, checkpoint.config, torch.float32)
    find_quantization(quantization, number_type)
    checkpoint.check_files()
    if attention is not None:
        empty_model(checkpoint.config, number_type, attention)


class _Checkpoint:
    """A located checkpoint and its config, before its weights are touched."""

    def __init__(
        self, path_or_hub_id: str | Path, sparsity_overrides: dict[str, Any], weights: bool = True
    ) -> None:
        self.name, self.directory = path_or_hub_id, find_checkpoint(path_or_hub_id, weights)
        self.values = read_json(self.directory / "config.json")
        self.layout = layout_of(self.directory, self.values)
        self.config = read_config(self.directory, self.values)
        text: Any = self.config.text_config
        self.before = text.sparsity
        text.sparsity = text.sparsity.replace(**policy_changes(sparsity_overrides))
        policy = check_policy(text.sparsity, text.num_hidden_layers)
        family = FAMILIES[self.config.model_type.removeprefix(PREFIX)]
        family.check_family(policy)
        family.check_images(policy, self.config)
        _check_vision_layer(self.directory, self.config)
        self.tokenizer = None if self.layout == FAMILY else read_tokenizer(self.directory, self.layout)
        if self.layout in (ORIGINAL, PUBLISHED):
            _add_placeholders(self.directory, self.config, self.tokenizer)

    def processor(self) -> Any:
        """Return the checkpoint's processor."""
        return read_processor(self.directory, self.layout, self.values, self.config, self.tokenizer)

    def check_files(self) -> None:
        """Raise `UserError` for a file that is missing or damaged; a hub's weights that aren't here may come later."""
        self.processor()
        self._generation_config()
        if is_adapter(self.directory) or (HUB_ID.match(str(self.name)) and not Path(self.name).is_dir()):
            return
        names = [name for file in weight_files(self.directory) for name in read_file(file)]
        check_depth(self.directory, names, self.config.text_config.num_hidden_layers)

    def model(
        self,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        attention: str | None,
        quantization: str | None,
    ) -> SparseVLM:
        """Return the model with the checkpoint's weights; the arguments are `load_model`'s."""
        target = find_device(device)
        tensors = self._weights(dtype)
        if not self.config.sparsity.prompt_predictor:  # one that a published config.json leaves off
            tensors = {name: x for name, x in tensors.items() if not name.startswith(PROMPT_PREDICTOR)}
        check_depth(self.directory, tensors, self.config.text_config.num_hidden_layers)
        wanted = self._dtype(dtype, tensors)
        model = build(
            self.directory, self.config, _with_rows(tensors, self.config.text_config.vocab_size), wanted, attention, target,
            find_quantization(quantization, wanted),
            may_be_absent=self._may_be_absent, may_be_fresh=self.layout not in (OWN, PUBLISHED),
        )  # fmt: skip
        model.generation_config = self._generation_config()
        return model

    def _dtype(self, asked: str | torch.dtype | None, tensors: dict[str, torch.Tensor]) -> torch.dtype:
        first = tensors.get(EMBEDDINGS[0], next(iter(tensors.values()), torch.empty(0)))
        return find_dtype(asked, self.config, first.dtype)

    def _weights(self, dtype: str | torch.dtype | None) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors; where an adapter is merged, its matrices in the `dtype` of the model."""
        if is_adapter(self.directory):
            tensors = self._base_weights(dtype)
            tensors = merge_adapter(self.directory, tensors, self._dtype(dtype, tensors))
        else:
            files = weight_files(self.directory)
            read_ahead(files)
            tensors = read_weights(*files)
        if self.layout in (ORIGINAL, PUBLISHED) and not any(name.startswith(VISION) for name in tensors):
            files = weight_files(vision_folder(self.directory, self.values, weights=True))
            tensors |= read_weights(*files, rename=lambda name: VISION + name.removeprefix("vision_model."))
        return tensors

    def _base_weights(self, dtype: str | torch.dtype | None) -> dict[str, torch.Tensor]:
        name = base_of(self.directory)
        folder = find_checkpoint(name)
        if (
            self.layout in (ORIGINAL, PUBLISHED)
            and read_json(folder / "config.json").get("model_type") == "llama"
        ):
            # The original code's adapters change an LLM without a vision side.
            return read_weights(*weight_files(folder))
        text: Any = self.config.text_config
        return _Checkpoint(name, {})._weights(dtype or self.config.dtype or text.dtype)

    def _may_be_absent(self, name: str) -> bool:
        return is_added(name, self.before) or _unused_in_vision_tower(name, self.config)

    def _generation_config(self) -> GenerationConfig:
        """Ours as saved; of the others the token ids only, not the sampling settings of a chat demo."""
        file = self.directory / "generation_config.json"
        if self.layout in (OWN, FAMILY) and file.is_file():
            return GenerationConfig.from_dict(read_json(file))
        text: Any = self.config.text_config
        return GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )


def _say_what_is_fresh(name: str | Path, model: SparseVLM) -> None:
    policy = model._llm.policy
    if model.fresh_predictors and policy.predictors:
        logger.warning(
            "%s has no predictors: fresh, untrained ones stand in; before you use %s mode, train them "
            "(or take mode='full' or a training-free policy, e.g. policy='fastv')",
            name,
            policy.name,
        )


def _check_vision_layer(directory: Path, config: Any) -> None:
    """Raise `UserError` for image features that are taken behind the vision tower's last layer."""
    used = getattr(config, "vision_feature_layer", None)
    layers = getattr(config.vision_config, "num_hidden_layers", None)
    if used is None or layers is None:
        return
    for index in used if isinstance(used, (list, tuple)) else [used]:
        if not -layers - 1 <= index <= layers:
            raise UserError(
                f"{directory / 'config.json'}: vision_feature_layer {index} is not among the vision tower's {layers} layers"
            )


def _add_placeholders(directory: Path, config: DynamicLlavaConfig, tokenizer: Any) -> None:
    """Give a published vocabulary an image and a padding token, as llava-hf did.

    The tokenizer's new ids follow its own vocabulary; where the model has no rows for them, it gets some.
    """
    text: Any = config.text_config
    rows = text.vocab_size
    if tokenizer is None:
        image, pad = rows, rows + 1
    else:
        image, pad = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.pad_token_id
        if len(tokenizer) - 2 > rows:
            raise UserError(
                f"{directory}: its tokenizer has {len(tokenizer) - 2} tokens, its model only {rows}"
            )
    config.image_token_index = image
    config.pad_token_id = text.pad_token_id = pad
    text.vocab_size = max(rows, image + 1, pad + 1)
    config.placeholder_tokens = text.vocab_size - rows


def _with_rows(tensors: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Return `tensors` with the vocabulary's new rows, zeros: no one reads them (image features, masked padding)."""
    for name in EMBEDDINGS:
        if name in tensors and 0 < (extra := rows - len(tensors[name])) <= 2:
            tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(extra, tensors[name].shape[1])])
    return tensors


def _unused_in_vision_tower(name: str, config: Any) -> bool:
    """Return whether a parameter is of a layer behind the one whose output is used."""
    used = getattr(config, "vision_feature_layer", None)
    if not name.startswith(VISION) or not isinstance(used, int):
        return False
    # hidden_states[last] is the output of layer last - 1
    last = used if used >= 0 else config.vision_config.num_hidden_layers + 1 + used
    if getattr(config, "projector_type", None) == TOKENPACKER:
        last = max(last, *PACKED_STATES)
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    return int(layer[1]) >= last if layer else ".post_layernorm." in name
