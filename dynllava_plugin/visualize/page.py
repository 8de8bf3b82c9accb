"""An explanation as one HTML file without anything from outside: hovering over a patch or a word shows its score."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from dynllava_plugin.visualize.explain import Explanation, View
from dynllava_plugin.visualize.picture import greyed, summary

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: min(24px, 3vw); color: #141414; overflow-wrap: anywhere; }
.policies { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; }
section { width: min(384px, 100%); } h2 { font-size: 16px; margin: 0; } .note { color: #5a5a5a; font-size: 13px; margin: 0 0 6px; }
.image { position: relative; margin-bottom: 8px; }
.image img { position: absolute; width: 100%; height: 100%; image-rendering: auto; }
.patch { position: absolute; box-sizing: border-box; }
.patch:hover, .token:hover { outline: 2px solid #d1495b; z-index: 2; }
.token { white-space: pre-wrap; } .token.dropped { color: #b2b2b2; }
#tip { position: fixed; display: none; background: #141414; color: white; font-size: 13px; padding: 3px 8px; border-radius: 4px;
  pointer-events: none; z-index: 3; }
"""
_SCRIPT = """
const tip = document.getElementById("tip");
document.addEventListener("mousemove", event => {
  const target = event.target.closest("[data-tip]");
  tip.style.display = target ? "block" : "none";
  if (!target) return;
  tip.textContent = target.dataset.tip;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = (event.clientY + 16) + "px";
});
"""


def page(explanations: Sequence[Explanation]) -> str:
    """Return HTML: a section an explanation, as wide as the window at most; its image is the picture's, with the same greys."""
    notes = max(len(summary(explanation)) for explanation in explanations)
    sections = "\n".join(_section(explanation, notes) for explanation in explanations)
    question = escape(explanations[0].question)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{question}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{question}</h1>\n"
        f'<div class="policies">\n{sections}\n</div>\n<div id="tip"></div>\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _image(explanation: Explanation, view: View) -> str:
    """A view, each of its tokens a place to hover over."""
    (rows, columns), (height, width) = view.tokens.shape, view.image.shape[:2]
    patches = []
    for (row, column), token in np.ndenumerate(view.tokens):
        place = f"left:{100 * column / columns:.4f}%;top:{100 * row / rows:.4f}%;"
        place += f"width:{100 / columns:.4f}%;height:{100 / rows:.4f}%"
        kept, name = bool(explanation.image_keep[token]), f"row {row + 1}, column {column + 1}"
        tip = _tip(name, kept, explanation.image_score, token)
        patches.append(
            f'<div class="patch{"" if kept else " dropped"}" style="{place}" data-tip="{tip}"></div>'
        )
    return (
        f'<div class="image" style="aspect-ratio:{width}/{height}"><img alt="the image as the model saw it" '
        f'src="{_data_url(greyed(view, explanation.image_keep))}">{"".join(patches)}</div>\n'
    )


def _section(explanation: Explanation, notes: int) -> str:
    """A policy's part, with room for so many notes, so that images side by side stand level."""
    words = []
    for index, (token, kept) in enumerate(zip(explanation.tokens, explanation.text_keep, strict=True)):
        tip = _tip(f"token {index + 1}", bool(kept), explanation.text_score, index)
        words.append(
            f'<span class="token{"" if kept else " dropped"}" data-tip="{tip}">{escape(token)}</span>'
        )
    lines = [escape(line) for line in summary(explanation)]
    note = "<br>".join(lines + ["&nbsp;"] * (notes - len(lines)))
    return (
        f'<section><h2>{escape(explanation.policy)}</h2><p class="note">{note}</p>'
        f"{''.join(_image(explanation, view) for view in explanation.views)}"
        f'<p class="answer">{"".join(words)}</p></section>'
    )


def _tip(name: str, kept: bool, scores: np.ndarray | None, index: int) -> str:
    said = "no score" if scores is None else f"score {float(scores[index]):.4g}"
    return escape(f"{name}: {'kept' if kept else 'dropped'}, {said}", quote=True)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
