"""`explain`: the decisions of one question about one image, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import unpad_image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.prompting import style_of
from dynllava_plugin.evaluation.results.record import prefill_costs
from dynllava_plugin.flops import DecoderShape
from dynllava_plugin.images import open_image
from dynllava_plugin.sparsity.cache import CACHE_NAME


@dataclass(frozen=True)
class View:
    """A picture of the image, or of all of it in little, and the tokens that lie on it.

    Attributes
    ----------
    image : uint8 [H, W, 3]
        As the model saw it: padded, resized, cropped.
    tokens : int64 [rows, columns]
        Their numbers among the image's tokens.
    """

    image: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """What a policy kept of one image and one answer.

    Attributes
    ----------
    policy, question, answer : str
    views : tuple of View
        Of tiles two, the whole image and the tiles joined; else one.
    image_keep : bool [image tokens]
        Where a policy merges tokens: the places that the merged ones take.
    image_score : float32 [image tokens] or None
        How much each token spoke for staying, on the policy's own scale; None where it has none.
    tokens : list of str, T
        The answer, piece by piece; the end token is left out. A character that is several tokens stands with the last
        of them, the others are empty.
    text_keep : bool [T]
        Whether later tokens could see it. The last token is never looked back at and counts as kept.
    text_score : float32 [T] or None
    equivalent_tokens : float
        Mean over layers of the image tokens present in prefill.
    untrained : bool
        Whether predictors chose that nobody trained: the checkpoint has none.
    """

    policy: str
    question: str
    answer: str
    views: tuple[View, ...]
    image_keep: np.ndarray
    image_score: np.ndarray | None
    tokens: list[str]
    text_keep: np.ndarray
    text_score: np.ndarray | None
    equivalent_tokens: float
    untrained: bool = False


@torch.inference_mode()
def explain(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    max_new_tokens: int = 256,
    policy_name: str | None = None,
) -> Explanation:
    """Answer `question` about `image` greedily under the model's policy and return what it kept.

    Parameters
    ----------
    model, processor
        As `load_model` gives them; the policy is the one set by `set_sparsity`.
    image : path or PIL image
    question : str
    max_new_tokens : int
    policy_name : str, optional
        What to call the policy; its own name where None.

    Returns
    -------
    Explanation
        For a picture or a page of it, as `dynllava show` makes them: `visualize.picture.draw`, `visualize.page.page`.

    Notes
    -----
    H2O decides for each head of each layer, so that a token's score is the share of them that hold it in the end, and it
    counts as kept where that is at least a half.

    Raises
    ------
    UserError
        An image that can't be read, an empty question, image tokens that are no grid.
    """
    policy = model.model.language_model.policy
    prompt = style_of(model, processor).prompt([(question, None)], 1, "question")
    picture = open_image(image, "")
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt").to(model.device)
    views = _views(model, processor, inputs, picture)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    width = inputs["input_ids"].shape[1]
    answer = _without_end(out.sequences[0, width:].tolist(), model, processor)
    decisions = (_held if policy.sequential else _decided)(model, dict(inputs), answer)
    places, entered = len(decisions["image_keep"]), decisions.pop("entered")
    counts = {"prompt_tokens": width, "image_tokens": places, "kept_image_tokens": entered}
    costs = prefill_costs(DecoderShape.of(model.config.text_config), policy, counts)
    return Explanation(
        policy=policy_name or policy.name,
        question=question,
        answer=processor.tokenizer.decode(answer, skip_special_tokens=True).strip(),
        views=views,
        tokens=_pieces(processor.tokenizer, answer),
        equivalent_tokens=costs["equivalent_tokens"],
        untrained=bool(policy.predictors) and model.fresh_predictors,
        **decisions,
    )


def _views(model: Any, processor: Any, inputs: Any, picture: Image.Image) -> tuple[View, ...]:
    """Return where the one image's tokens lie on it.

    Raises
    ------
    UserError
        Image tokens that are no square grid.
    """
    vision = model.config.vision_config
    numbers = np.arange(int((inputs["input_ids"] == model.config.image_token_id).sum()))
    if "image_grid_thw" in inputs:  # Qwen's patches, some of them merged into a token
        rows, columns = (inputs["image_grid_thw"][0, 1:] // vision.spatial_merge_size).tolist()
        side = vision.patch_size * vision.spatial_merge_size
        seen = np.asarray(picture.resize((columns * side, rows * side)))
        return (View(seen, numbers.reshape(rows, columns)),)
    pixels = _as_seen(inputs["pixel_values"].float().cpu(), processor.image_processor)
    if pixels.ndim == 5:
        return _tiles_and_line_ends(model, inputs, pixels[0], numbers)
    if "image_sizes" in inputs:  # Mistral3's patches, likewise
        height, width = inputs["image_sizes"][0].tolist()
        rows = height // (vision.patch_size * model.config.spatial_merge_size)
        return (View(pixels[0, :height, :width], numbers.reshape(rows, -1)),)
    side = round((len(numbers) / len(pixels)) ** 0.5)
    if side * side * len(pixels) != len(numbers):
        raise UserError(
            f"image: {len(numbers)} image tokens are not a square grid, which is all that can be drawn"
        )
    tokens = numbers.reshape(-1, side, side)
    if len(pixels) == 1:
        return (View(pixels[0], tokens[0]),)
    images = processor.image_processor  # InternVL's tiles, the whole image behind them
    size, limits = (picture.height, picture.width), (images.min_patches, images.max_patches)
    _, rows = get_optimal_tiled_canvas(size, pixels.shape[1:3], *limits)
    return View(pixels[-1], tokens[-1]), View(_joined(pixels[:-1], rows), _joined(tokens[:-1], rows))


def _tiles_and_line_ends(model: Any, inputs: Any, tiles: np.ndarray, numbers: np.ndarray) -> tuple[View, ...]:
    """Return LLaVA-NeXT's and OneVision's views: the whole image, and its tiles without their padding; a line's end is on none."""
    vision, size = model.config.vision_config, inputs["image_sizes"][0].tolist()
    patch, side = vision.patch_size, vision.image_size // vision.patch_size
    tiles = tiles[:, : side * patch, : side * patch]  # SigLIP's 384 pixels are 27 patches and a rest
    canvas = select_best_resolution(size, model.config.image_grid_pinpoints)
    high, wide = (length // vision.image_size * side for length in canvas)
    shown = unpad_image(torch.arange(high * wide).view(1, high, wide), size)[0]
    (top, left), (rows, columns) = divmod(int(shown[0, 0]), wide), shown.shape
    seen = _joined(tiles[1:], high // side)
    seen = seen[top * patch : (top + rows) * patch, left * patch : (left + columns) * patch]
    newline = model.model.image_newline
    features = model.encode("image", inputs).pooler_output[0][:, : len(newline)]
    ends = (features == newline).all(-1).cpu().numpy()
    numbers = numbers[~ends]
    lines = numbers[side * side :].reshape(
        ends.sum(), -1
    )  # fewer than `rows` where OneVision scales them down
    return View(tiles[0], numbers[: side * side].reshape(side, side)), View(seen, lines)


def _joined(tiles: np.ndarray, rows: int) -> np.ndarray:
    """Return [rows * h, columns * w, ...] of tiles [rows * columns, h, w, ...]."""
    _, height, width, *rest = tiles.shape
    grid = tiles.reshape(rows, -1, height, width, *rest)
    return grid.swapaxes(1, 2).reshape(rows * height, -1, *rest)


def _decided(model: Any, inputs: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """All decisions in one pass over prompt and answer, which are those of decoding."""
    width = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], device=model.device, dtype=torch.int64)], 1)
    images = {name: inputs[name] for name in model.image_inputs if name in inputs}
    out = model(ids, **images, use_cache=False, prompt_length=width, logits_to_keep=1)
    keep = (
        torch.ones_like(ids[ids == model.config.image_token_id])
        if out.image_keep is None
        else out.image_keep[0]
    )
    text_keep, text_score = np.ones(0, dtype=bool), None
    if answer:
        text_keep = out.text_keep[0, -len(answer) :].cpu().numpy().copy()
        text_score = _array(out.text_score, -len(answer))
        text_keep[-1] = True
    return {
        "image_keep": keep.bool().cpu().numpy(), "image_score": _array(out.image_score), "text_keep": text_keep,
        "text_score": text_score, "entered": int(keep.sum()),
    }  # fmt: skip


def _array(score: torch.Tensor | None, start: int = 0) -> np.ndarray | None:
    return None if score is None else score[0, start:].float().cpu().numpy()


def _held(model: Any, inputs: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """For a policy that lets tokens go: what the heads hold in the end."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    entered = out.token_index[0]  # the prompt's tokens that entered the sparse layers, by column
    columns = entered[entered >= 0].tolist()
    is_image = (inputs["input_ids"][0] == model.config.image_token_id).cpu().numpy()
    image_places = int(is_image.sum()) if out.image_keep is None else int(out.image_keep.sum())
    width = len(is_image)
    for step, token in enumerate(answer[:-1]):
        out = model(torch.tensor([[token]], device=model.device), cache=getattr(out, CACHE_NAME))
        if out.text_keep is None or bool(out.text_keep[0, -1]):
            columns.append(width + step)
    share = np.zeros(width + len(answer), dtype=np.float32)
    heads = 0
    for layer in getattr(out, CACHE_NAME).layers:
        numbers = getattr(layer, "number", None)
        if numbers is not None:
            for head in numbers[0, :, : int(layer.track.lengths[0])].cpu().tolist():
                share[[columns[number] for number in head]] += 1
                heads += 1
    share /= max(heads, 1)
    image, text = share[:width][is_image], share[width:]
    if len(text):
        text[-1] = 1.0
    return {
        "image_keep": image >= 0.5, "image_score": image, "text_keep": text >= 0.5, "text_score": text,
        "entered": image_places,
    }  # fmt: skip


def _without_end(ids: list[int], model: Any, processor: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end, processor.tokenizer.eos_token_id])
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return each token's part of the text: up to where the tokens so far, decoded by themselves, agree with all of it."""
    whole, pieces, place = tokenizer.decode(ids), [], 0
    for count in range(1, len(ids) + 1):
        agreed = len(commonprefix([whole, tokenizer.decode(ids[:count])]))  # noqa: RUF071  (of characters, no paths)
        pieces.append(whole[place:agreed])
        place = max(place, agreed)
    return pieces


def _as_seen(pixels: torch.Tensor, image_processor: Any) -> np.ndarray:
    """Return normalised pixels, [..., 3, H, W], as uint8 [..., H, W, 3]."""
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    values = (pixels * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return values.movedim(-3, -1).numpy()
