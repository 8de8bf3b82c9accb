"""An explanation as a picture, in the manner of the paper's Figures 6 to 8: what was dropped is grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dynllava_plugin.visualize.explain import Explanation, View

SIZE, MARGIN, LINE = 384, 16, 22  # pixels
UNTRAINED = "the predictors are untrained: what they keep says nothing"
KEPT, DROPPED, NOTE = (20, 20, 20), (178, 178, 178), (90, 90, 90)


def greyed(view: View, keep: np.ndarray, size: int = 448) -> Image.Image:
    """Return a view at `size` pixels on its longer side, tokens that are False in `keep` bool [image tokens] greyed."""
    height, width = view.image.shape[:2]
    longer = max(height, width)
    shape = round(size * width / longer), round(size * height / longer)
    picture = Image.fromarray(view.image).resize(shape, Image.Resampling.BICUBIC)
    dropped = (~keep[view.tokens]).astype(np.uint8) * 255
    mask = Image.fromarray(dropped).resize(shape, Image.Resampling.NEAREST)
    grey = Image.blend(
        picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (128, 128, 128)), 0.8
    )
    picture.paste(grey, mask=mask)
    return picture


def draw(explanations: Sequence[Explanation], size: int = SIZE) -> Image.Image:
    """Return one panel an explanation, side by side: title, image, question and answer."""
    notes = max(len(summary(explanation)) for explanation in explanations)
    panels = [_panel(explanation, size, notes) for explanation in explanations]
    height = max(panel.height for panel in panels)
    picture = Image.new("RGB", (sum(panel.width for panel in panels), height), "white")
    left = 0
    for panel in panels:
        picture.paste(panel, (left, 0))
        left += panel.width
    return picture


def _panel(explanation: Explanation, size: int, notes: int) -> Image.Image:
    """Return one panel with room for so many notes, so that images side by side stand level."""
    font, small = _font(15), _font(13)
    width = size + 2 * MARGIN
    words = _wrapped(explanation.tokens, explanation.text_keep, font, size)
    asked = _wrapped([f" {word}" for word in explanation.question.split()], None, small, size)
    images = [greyed(view, explanation.image_keep, size) for view in explanation.views]
    height = 3 * MARGIN + LINE * (1 + notes + len(words) + len(asked))
    height += sum(image.height + MARGIN for image in images)
    panel = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(panel)
    pen.text((MARGIN, MARGIN), explanation.policy, fill=KEPT, font=font)
    for number, note in enumerate(summary(explanation), 1):
        pen.text((MARGIN, MARGIN + number * LINE), note, fill=NOTE, font=small)
    top = MARGIN + (1 + notes) * LINE
    for image in images:
        panel.paste(image, (MARGIN + (size - image.width) // 2, top))
        top += image.height + MARGIN
    for line in asked:
        _write(pen, line, top, small, NOTE)
        top += LINE
    for line in words:
        _write(pen, line, top, font, None)
        top += LINE
    return panel


def summary(explanation: Explanation) -> list[str]:
    """Return how much stayed, in lines that fit above an image."""
    kept, total = int(explanation.image_keep.sum()), len(explanation.image_keep)
    dropped = int((~explanation.text_keep).sum())
    beside = np.ones(total, dtype=bool)
    for view in explanation.views:
        beside[view.tokens] = False
    ends = [f"line ends among them, not drawn: {explanation.image_keep[beside].sum()} of {beside.sum()} kept"]
    untrained = [UNTRAINED] if explanation.untrained else []
    return [
        f"image tokens: {kept} of {total} kept, {explanation.equivalent_tokens:.1f} equivalent",
        *(ends if beside.any() else []),
        f"output tokens: {dropped} of {len(explanation.tokens)} dropped",
        *untrained,
    ]


def _wrapped(
    tokens: Sequence[str], keep: np.ndarray | None, font: Any, width: int
) -> list[list[tuple[str, bool, float]]]:
    """Return lines of (text, kept, left edge); a word that is several tokens stays in one line where it fits."""
    lines: list[list[tuple[str, bool, float]]] = [[]]
    left = 0.0
    # A line break inside a text is one that PIL's layout refuses.
    tokens = ["".join(" " if letter.isspace() else letter for letter in token) for token in tokens]
    for index, text in enumerate(tokens):
        starts_word = text[:1].isspace()
        word = text + "".join(piece for piece in _rest_of_word(tokens, index + 1) if starts_word)
        if (
            left
            and left + font.getlength(word.rstrip()) > width
            and (starts_word or left + font.getlength(text) > width)
        ):
            lines.append([])
            left = 0.0
        if not lines[-1]:
            text = text.lstrip()
        lines[-1].append((text, True if keep is None else bool(keep[index]), left))
        left += font.getlength(text)
    return lines


def _rest_of_word(tokens: Sequence[str], start: int) -> list[str]:
    rest = []
    for token in tokens[start:]:
        if token[:1].isspace():
            break
        rest.append(token)
    return rest


def _write(pen: Any, line: list[tuple[str, bool, float]], top: float, font: Any, color: Any) -> None:
    for text, kept, left in line:
        pen.text((MARGIN + left, top), text, fill=color or (KEPT if kept else DROPPED), font=font)


def _font(size: int) -> Any:
    try:
        from matplotlib import font_manager

        return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)
