"""`explain`, the picture and the page: what they show is what the model decided."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dynllava_plugin import explain, load_model
from dynllava_plugin.cli import main
from dynllava_plugin.evaluation.engine.prompting import style_of
from dynllava_plugin.visualize.explain import Explanation, _pieces
from dynllava_plugin.visualize.page import page
from dynllava_plugin.visualize.picture import draw, greyed
from tests.browser import Browser, find_browser
from tests.families.checkpoints import write_checkpoint

QUESTION = "Describe the image in detail."


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red and a blue box on white, wider than high."""
    image = Image.new("RGB", (160, 128), "white")
    image.paste((200, 30, 30), (20, 30, 60, 90))
    image.paste((30, 30, 200), (100, 60, 150, 110))
    path = tmp_path_factory.mktemp("show") / "boxes.png"
    image.save(path)
    return path


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = load_model("tiny", device="cpu")
    return model, processor


def explained(tiny: tuple[Any, Any], picture: Path, policy: str, tokens: int = 7) -> Explanation:
    tiny[0].set_sparsity(policy=policy)
    return explain(*tiny, picture, QUESTION, max_new_tokens=tokens)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_qwen2"])
def test_other_families_are_drawn_by_their_grid(family: str, picture: Path, tmp_path: Path) -> None:
    """The places that stay are those of `forward`, row by row of an image that is wider than high."""
    model, processor = load_model(
        write_checkpoint(family, tmp_path / family), device="cpu", policy="random,r=0.5"
    )
    found = explain(model, processor, picture, QUESTION, max_new_tokens=5)
    rows, columns = found.views[0].tokens.shape
    assert rows * columns == len(found.image_keep) and (rows < columns) == (family != "llava_qwen2")
    assert found.image_keep.sum() == rows * columns - int(0.5 * rows * columns)
    assert greyed(found.views[0], found.image_keep, 256).size == (256, 256 * rows // columns)
    output = tmp_path / "kept.png"
    flags = [
        "--pretrained",
        str(tmp_path / family),
        "--policy",
        "random,r=0.5",
        "h2o,r=0.5",
        "--max-new-tokens",
        "5",
    ]
    assert main(["show", str(picture), QUESTION, *flags, "--device", "cpu", "--output", str(output)]) == 0
    assert (
        output.stat().st_size and f"row {rows}, column {columns}" in output.with_suffix(".html").read_text()
    )


TILES = ["llava_next", "llava_next_video", "llava_onevision", "internvl"]


@pytest.mark.parametrize("family", [*TILES, "mistral3", "llava_qwen2"])
@torch.no_grad()
def test_a_token_lies_where_its_pixels_are(family: str, picture: Path, tmp_path: Path) -> None:
    """Of a tower that mixes no tokens: what changes in a picture changes the tokens that are drawn there, and no others."""
    folder = write_checkpoint(family, tmp_path / "model")
    model, processor = load_model(folder, device="cpu", policy="random,r=0.5")
    for name, parameter in model.model.vision_tower.named_parameters():
        if re.search("out_proj|o_proj|projection_layer", name):
            parameter.zero_()
    views, features = [], []
    for painted in (False, True):
        image = Image.open(picture)
        if painted:
            image.paste((20, 200, 60), (96, 16, 128, 40))
        image.save(tmp_path / "picture.png")
        found = explain(model, processor, tmp_path / "picture.png", QUESTION, max_new_tokens=1)
        prompt = style_of(model, processor).prompt([(QUESTION, None)], 1, "question")
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        encoded = torch.cat([*model.encode("image", inputs).pooler_output])[:, :64]
        views.append(found.views)
        features.append(encoded)
        assert len(found.image_keep) == len(encoded)
    moved = (features[0] - features[1]).norm(dim=-1)
    moved = (moved > 0.05 * moved.max()).numpy()
    for before, after in zip(*views, strict=True):
        difference = Image.fromarray(np.abs(before.image.astype(int) - after.image).max(-1).astype(np.uint8))
        # OneVision's lines are blends of more lines, and of what is around.
        around = difference.filter(ImageFilter.MaxFilter(15 if family == "llava_onevision" else 1))
        rows, columns = before.tokens.shape
        inside, near = (
            np.asarray(pixels)
            .repeat(rows, 0)
            .repeat(columns, 1)
            .reshape(rows, difference.height, columns, difference.width)
            .max((1, 3))
            for pixels in (difference, around)
        )
        assert 0 < moved[before.tokens].mean() < 0.5 and not (moved[before.tokens] & (near == 0)).any()
        assert not (~moved[before.tokens] & (inside > 100)).any()
    drawn = np.concatenate([view.tokens.flatten() for view in views[0]])
    assert (
        len(set(drawn.tolist())) == len(drawn) and not moved[np.setdiff1d(range(len(encoded)), drawn)].any()
    )
    assert ("line ends" in page([found])) == (family in TILES[:3])
    assert len(views[0]) == 1 + (family in TILES)


def test_equivalent_tokens_where_the_cache_lets_tokens_go(tiny: tuple[Any, Any], picture: Path) -> None:
    """What enters the layers behind the decision counts, not what the cache holds in the end."""
    alone = explained(tiny, picture, "fastv,k=2,keep=0.25").equivalent_tokens
    assert explained(tiny, picture, "fastv+h2o,k=2,keep=0.25,h2o.r=0.3").equivalent_tokens == alone < 64
    assert explained(tiny, picture, "h2o,r=0.3").equivalent_tokens == 64


def test_dropped_words_under_two_policies(tiny: tuple[Any, Any], picture: Path) -> None:
    """Words that never entered the cache are grey, whatever it lets go of the others."""
    words = explained(tiny, picture, "structure").text_keep
    both = explained(tiny, picture, "h2o+structure,r=1.0")
    assert not words.all() and np.array_equal(both.text_keep, words)


@pytest.mark.parametrize(
    "policy", ["full", "fastv,k=2,keep=0.25", "visionzip,n=9", "image+structure", "h2o,r=0.4"]
)
def test_explanation_is_what_the_model_does(tiny: tuple[Any, Any], picture: Path, policy: str) -> None:
    found = explained(tiny, picture, policy)
    image, tokens = found.views[0].image, found.views[0].tokens
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert np.array_equal(tokens, np.arange(64).reshape(8, 8)) and found.image_keep.shape == (64,)
    assert len(found.tokens) == len(found.text_keep) > 0
    assert "".join(found.tokens).strip() == found.answer
    if policy == "full":
        assert found.image_keep.all() and found.text_keep.all() and found.image_score is None
    elif policy.startswith("h2o"):
        assert 0 < found.image_keep.mean() < 1 and ((found.image_score >= 0) & (found.image_score <= 1)).all()
    else:
        expected = {"fastv": 16, "vision": 9, "image+": 12}[
            next(k for k in ("fastv", "vision", "image+") if policy.startswith(k))
        ]
        assert found.image_keep.sum() == expected
    if policy.startswith("fastv"):
        kept, dropped = found.image_score[found.image_keep], found.image_score[~found.image_keep]
        assert kept.min() >= dropped.max()
    if policy == "image+structure":
        assert (found.text_keep[:-2] != found.text_keep[1:-1]).all()


def test_image_is_shown_as_the_model_saw_it(tiny: tuple[Any, Any], picture: Path) -> None:
    """Padded to a square: the mean colour above and below, the boxes between."""
    found = explained(tiny, picture, "full", tokens=1)
    _, processor = tiny
    seen = np.asarray(processor.prepare_image(Image.open(picture)))
    assert np.abs(found.views[0].image.astype(int) - seen.astype(int)).max() <= 1


def test_dropped_patches_and_words_are_grey(tiny: tuple[Any, Any], picture: Path) -> None:
    found = explained(tiny, picture, "image+structure")
    image = np.asarray(greyed(found.views[0], found.image_keep, 256)).astype(int)
    for place, kept in enumerate(found.image_keep):
        row, column = divmod(place, 8)
        patch = image[32 * row + 4 : 32 * row + 28, 32 * column + 4 : 32 * column + 28]
        is_grey = np.ptp(patch, axis=2).max() <= 1 and np.abs(patch - 140).max() <= 60
        assert is_grey or kept
        original = np.asarray(
            Image.fromarray(found.views[0].image).resize((256, 256), Image.Resampling.BICUBIC)
        ).astype(int)
        same = np.array_equal(
            patch, original[32 * row + 4 : 32 * row + 28, 32 * column + 4 : 32 * column + 28]
        )
        assert same == bool(kept)
    both = draw([found, explained(tiny, picture, "full")])
    assert both.width == 2 * draw([found]).width and both.height >= draw([found]).height
    words = np.asarray(draw([found]))[-120:].reshape(-1, 3)
    assert (words == (178, 178, 178)).all(1).any() and (words == (20, 20, 20)).all(1).any()


@pytest.mark.parametrize("letter", ["\n", "\r", "\x1c", "\x85", "\u2029"])
def test_a_line_break_inside_a_word_is_drawn_as_a_blank(
    tiny: tuple[Any, Any], picture: Path, letter: str
) -> None:
    """As in a list: "1.", a line break with the next word behind it. PIL's layout refuses one."""
    found = explained(tiny, picture, "full")
    tokens = [" a", " 1", f".{letter}", "red"]
    draw([replace(found, tokens=tokens, text_keep=np.ones(4, dtype=bool))])


@pytest.mark.skipif(
    find_browser() is None, reason="no Chromium here (Debian: apt-get install chromium-headless-shell)"
)
def test_page_in_a_browser(tiny: tuple[Any, Any], picture: Path, tmp_path: Path) -> None:
    """Hovering shows each patch's and word's score; nothing is fetched, nothing fails."""
    explanations = [explained(tiny, picture, text) for text in ("fastv,k=2,keep=0.25", "image+structure")]
    file = tmp_path / "page.html"
    file.write_text(page(explanations), encoding="utf-8")
    browser = Browser(find_browser() or "", tmp_path / "profile")
    try:
        browser.open(file)
        assert browser.value("document.querySelectorAll('section').length") == 2
        assert browser.value("document.querySelectorAll('img')[0].naturalWidth") == 448
        assert browser.value("getComputedStyle(document.getElementById('tip')).display") == "none"
        for number, found in enumerate(explanations):
            section = f"section:nth-of-type({number + 1})"
            dropped = [place for place, kept in enumerate(found.image_keep) if not kept]
            kept = [place for place, kept in enumerate(found.image_keep) if kept]
            for place, word in ((dropped[0], "dropped"), (kept[-1], "kept")):
                browser.hover(f"{section} .patch", place)
                row, column = divmod(place, 8)
                score = f"{float(found.image_score[place]):.4g}"
                expected = f"row {row + 1}, column {column + 1}: {word}, score {score}"
                assert browser.value("document.getElementById('tip').textContent") == expected
                assert browser.value("getComputedStyle(document.getElementById('tip')).display") == "block"
            browser.hover(f"{section} .token", 1)
            state = "kept" if found.text_keep[1] else "dropped"
            assert (
                browser.value("document.getElementById('tip').textContent") == f"token 2: {state}, no score"
            )
            text = browser.value(f"document.querySelector('{section} .answer').textContent")
            assert text.strip() == found.answer
        metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.call("Emulation.setDeviceMetricsOverride", **metrics)
        assert browser.value("document.documentElement.scrollWidth") <= 390
        assert browser.value("document.querySelector('.image').getBoundingClientRect().right") <= 390
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
        assert browser.value("getComputedStyle(document.getElementById('tip')).display") == "none"
        assert browser.problems == []
        assert all(url.startswith(("file:", "data:")) for url in browser.requests)
    finally:
        browser.close()


def test_the_pages_image_is_the_pictures(tiny: tuple[Any, Any], picture: Path) -> None:
    """The same greys, and no width that a telephone hasn't got."""
    found = explained(tiny, picture, "fastv,k=2,keep=0.25")
    html = page([found])
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    shown = [Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded]
    assert len(shown) == 1 and np.array_equal(
        np.asarray(shown[0]), np.asarray(greyed(found.views[0], found.image_keep))
    )
    assert 'name="viewport"' in html and "background: rgba" not in html
    assert [float(width) for width in re.findall(r"[{; ]width: (\d+)px", html)] == []


def test_untrained_predictors_are_told(tiny: tuple[Any, Any], picture: Path) -> None:
    assert tiny[0].fresh_predictors
    for policy, said in (("image", True), ("fastv", False)):
        found = explained(tiny, picture, policy, tokens=1)
        assert ("untrained" in page([found])) == found.untrained == said
        assert draw([found]).height == draw([replace(found, untrained=False)]).height + 22 * said
        both = page([found, replace(found, untrained=False)])  # images side by side stand level
        notes = re.findall(r'<p class="note">(.*?)</p>', both)
        assert len({note.count("<br>") for note in notes}) == 1 and ("&nbsp;" in notes[1]) == said


@pytest.mark.parametrize("text", ["a \u2713 \u65e5\u672c\u00e9 x", "\U0001f600\U0001f600 ok"])
def test_a_character_of_several_tokens_stands_with_its_last(tiny: tuple[Any, Any], text: str) -> None:
    tokenizer = tiny[1].tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = _pieces(tokenizer, ids)
    assert len(pieces) == len(ids) > len(text) and "".join(pieces) == tokenizer.decode(ids) == text
    assert {len(piece) for piece in pieces} == {0, 1}  # the bundled tokenizer has no longer one for these
    broken = _pieces(tokenizer, ids[:4])
    assert "".join(broken) == tokenizer.decode(ids[:4])


def test_command(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "kept.png"
    flags = [
        "--policy",
        "full",
        "random,r=0.5",
        "image",
        "--max-new-tokens",
        "3",
        "--output",
        str(target),
        "--device",
        "cpu",
    ]
    assert main(["show", str(picture), "what color is it?", *flags]) == 0
    printed, said = capsys.readouterr()
    assert "random,r=0.5: " in printed and f"picture: {target}" in printed
    assert said.count("untrained") == 1 and "image: the predictors are untrained" in said
    assert Image.open(target).width > 800 and "<section>" in target.with_suffix(".html").read_text()
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["missing.png", "what?"], "image missing.png doesn't exist"),
        (["{image}", "what?", "--policy", "fast"], "policy: unknown value 'fast'"),
        (["{image}", " "], "question: the question is empty"),
        (["{image}", "what?", "--output", "kept.jpg"], "--output: kept.jpg must end in .png"),
        (["{image}", "what?", "--max-new-tokens", "0"], "--max-new-tokens: 0 is not positive"),
    ],
)
def test_what_is_wrong_is_one_line(
    flags: list[str], problem: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *(flag.format(image=picture) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {problem}") and error.count("\n") == 1


def test_an_unreadable_image_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    assert main(["show", str(broken), "what?"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
