"""Prompts, token ids and pixels equal the original LLaVA-1.5 code's; bad input is named."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import AddedToken, AutoProcessor
from transformers.models.clip import CLIPImageProcessor

from dynllava_plugin import load_model
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints.tokenizers import from_sentencepiece
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.model.prompts import SYSTEM, vicuna_v1, with_images
from tests.fake_checkpoints import VOCABULARY, train_tokenizer
from tests.property_tests import examples

IMAGE = -200  # the original code's image marker
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def processors(tokenizer_model: Path) -> dict[str, DynamicLlavaProcessor]:
    return {spacing: make_processor(tokenizer_model, spacing=spacing) for spacing in ("image", "special")}


def make_processor(tokenizer_model: Path, **options: str) -> DynamicLlavaProcessor:
    tokenizer = from_sentencepiece(tokenizer_model)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return DynamicLlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **{"image_aspect_ratio": "pad", "spacing": "image", **options},
    )


def original_ids(file: Path, prompt: str, legacy: bool) -> list[int]:
    """The original code's ids: each chunk between images by transformers 4's slow Llama tokenizer."""
    # appended to a protobuf: normalizer_spec { add_dummy_prefix: false }
    proto = file.read_bytes() + (b"" if legacy else b"\x1a\x02\x18\x00")
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    unknown = len(model.encode("<unk>"))
    specials = {"<s>": 1, "</s>": 2, "<unk>": 0}
    ids = [1]
    for number, chunk in enumerate(prompt.split("<image>")):
        if number:
            ids.append(IMAGE)
        if not legacy and chunk:
            chunk = "▁" + chunk.replace("▁", " ")
        tokens: list[int] = []
        for text in filter(None, re.split("(<s>|</s>|<unk>)", chunk)):
            if text in specials:
                tokens.append(specials[text])
            elif legacy or text[0] not in "▁ ":
                tokens += model.encode(text)
            else:
                tokens += model.encode("<unk>" + text)[unknown:]
        if (
            not legacy
            and len(tokens) > 1
            and tokens[0] == model.piece_to_id("▁")
            and tokens[1] in specials.values()
        ):
            tokens = tokens[1:]
        ids += tokens
    return ids


words = st.sampled_from(
    ["<image>", "</s>", "<s>", "\n", " ", "  ", "USER:", " ASSISTANT:", "red", "é☃", "▁", "1234", "?"]
)
prompts = st.lists(
    st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=12)), max_size=12
)


@examples(300)
@given(parts=prompts, legacy=st.booleans())
@example(
    parts=[SYSTEM, " USER: ", "<image>", "\nWhat is it? ASSISTANT: red", "</s>", "USER: and ASSISTANT:"],
    legacy=False,
)
@example(parts=["<image>", "</s>", " x"], legacy=True)
@example(parts=[" two leading ", "<image>", " x", "<image>", "<image>"], legacy=False)
def test_ids_are_the_originals(
    parts: list[str], legacy: bool, tokenizer_model: Path, processors: dict[str, DynamicLlavaProcessor]
) -> None:
    prompt = "".join(parts).replace("<pad>", "")
    processor = processors["special" if legacy else "image"]
    count = prompt.count("<image>")
    pixels = [Image.new("RGB", (28, 28))] * count
    ids = processor(images=pixels or None, text=[prompt])["input_ids"][0]
    # four image tokens stand for one marker
    expected = [
        token
        for original in original_ids(tokenizer_model, prompt, legacy)
        for token in ([VOCABULARY] * 4 if original == IMAGE else [original])
    ]
    assert list(ids) == expected


def test_vicuna_v1() -> None:
    text = vicuna_v1([(with_images("What is it?"), "A dog"), ("And this?", None)])
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? "
        "ASSISTANT: A dog</s>"
        "USER: And this? ASSISTANT:"
    )
    with pytest.raises(ValueError, match="turn 0"):
        vicuna_v1([("a", None), ("b", None)])
    with pytest.raises(ValueError, match="at least one"):
        vicuna_v1([])


@pytest.mark.parametrize("answer", [None, "A dog"])
def test_chat_template_is_vicuna_v1(answer: str | None, processors: dict[str, DynamicLlavaProcessor]) -> None:
    def message(role: str, text: str, images: int = 0) -> dict:
        return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}

    messages = [message("user", "What's it?", 1), message("assistant", "A cat"), message("user", "This?")]
    messages += [message("assistant", answer)] if answer else []
    text = processors["image"].apply_chat_template(messages, add_generation_prompt=answer is None)
    assert text == vicuna_v1([(with_images("What's it?"), "A cat"), ("This?", answer)])


def original_pixels(image: Image.Image, edge: int, pad: bool) -> np.ndarray:
    """LLaVA's expand2square, then transformers 4's CLIP steps, in numpy."""
    image = image.convert("RGB")
    width, height = image.size
    if pad and width != height:
        square = Image.new("RGB", (max(image.size),) * 2, tuple(int(mean * 255) for mean in MEAN))
        square.paste(image, ((0, (width - height) // 2) if width > height else ((height - width) // 2, 0)))
        image = square
    width, height = image.size
    short, long = min(width, height), max(width, height)
    size = (edge, int(edge * long / short)) if width <= height else (int(edge * long / short), edge)
    pixels = np.asarray(image.resize(size, resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - edge) // 2, (pixels.shape[1] - edge) // 2
    pixels = pixels[top : top + edge, left : left + edge] / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


@examples(60)
@given(
    width=st.integers(5, 90),
    height=st.integers(5, 90),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
    aspect=st.sampled_from(["pad", "square"]),
    seed=st.integers(0, 99),
)
def test_pixels_are_the_originals(
    width: int, height: int, mode: str, aspect: str, seed: int, tokenizer_model: Path
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    processor = make_processor(tokenizer_model, image_aspect_ratio=aspect)
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0].numpy()
    np.testing.assert_allclose(pixels, original_pixels(image, 28, aspect == "pad"), atol=1e-5)


def test_padding_is_on_the_left_and_a_batch_changes_nothing(
    processors: dict[str, DynamicLlavaProcessor],
) -> None:
    processor = processors["image"]
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "blue", "green")]
    texts = ["<image>\nWhat?", "No image", "<image><image> What color is the shape?"]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[images[:1], [], images[1:]], text=texts, padding=True, return_tensors="pt")
    assert all(torch.equal(batch[key], nested[key]) for key in batch)
    groups = [images[:1], None, images[1:]]
    for row, (text, group) in enumerate(zip(texts, groups, strict=True)):
        alone = processor(images=group, text=text, return_tensors="pt")["input_ids"][0]
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - len(alone)) + [
            1
        ] * len(alone)
        assert torch.equal(batch["input_ids"][row][-len(alone) :], alone)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image> a", "<image><image> b"], 2, "sample 1: 2 <image> marker(s) in the prompt but 1 image(s)"),
        (["<image> a", "b"], 0, "sample 0: 1 <image> marker(s) in the prompt but 0 image(s)"),
        (["<image> a", "b"], 2, "sample 1: 0 <image> marker(s) in the prompt but 1 image(s)"),
        (["a", "b"], 1, "sample 1: 0 <image> marker(s) in the prompt but 1 image(s)"),
    ],
)
def test_wrong_number_of_images_names_the_sample(
    texts: list[str], images: int, message: str, processors: dict[str, DynamicLlavaProcessor]
) -> None:
    pixels = [Image.new("RGB", (28, 28))] * images
    with pytest.raises(UserError, match=re.escape(message)):
        processors["image"](images=pixels or None, text=texts, padding=True)


def test_unreadable_images_are_named(tmp_path: Path, processors: dict[str, DynamicLlavaProcessor]) -> None:
    whole, corrupt, truncated = (tmp_path / name for name in ("whole.png", "corrupt.png", "truncated.png"))
    Image.effect_noise((64, 64), 90).save(whole)
    corrupt.write_bytes(b"no image")
    truncated.write_bytes(whole.read_bytes()[:600])
    processors["image"](images=[str(whole)], text="<image>")
    for bad in (corrupt, truncated, tmp_path / "absent.png"):
        for path in (bad, str(bad)):
            with pytest.raises(UserError, match=bad.name) as error:
                processors["image"](images=[path], text="<image>")
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="uint8"):
        processors["image"](images=[np.zeros((4, 4))], text="<image>")


def test_an_address_gives_the_pixels_of_the_file(
    tmp_path: Path, processors: dict[str, DynamicLlavaProcessor]
) -> None:
    """A camera's note to turn the image counts in neither, as in LLaVA's code."""
    image, path = Image.effect_noise((40, 64), 90).convert("RGB"), tmp_path / "turned.png"
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(path, exif=exif)
    address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    pixels = [
        processors["image"](images=[where], text="<image>", return_tensors="pt")["pixel_values"]
        for where in (path, address, image)
    ]
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    with pytest.raises(UserError, match=r"image 0: image data:.* isn't an image"):
        processors["image"](images=["data:image/png;base64,AAAA"], text="<image>")


def test_round_trip(tmp_path: Path, tokenizer_model: Path) -> None:
    for options in ({"spacing": "special"}, {"image_aspect_ratio": "square"}):
        saved = make_processor(tokenizer_model, **options)
        saved.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert isinstance(loaded, DynamicLlavaProcessor)
        inputs = {
            "images": [Image.effect_noise((50, 30), 90)],
            "text": [vicuna_v1([(with_images("a"), "b"), ("c", None)])],
        }
        before, after = saved(**inputs, return_tensors="pt"), loaded(**inputs, return_tensors="pt")
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert loaded.tokenizer.padding_side == "left"


def test_unknown_settings_are_refused(tokenizer_model: Path) -> None:
    for name in ("image_aspect_ratio", "spacing"):
        with pytest.raises(UserError, match=name):
            make_processor(tokenizer_model, **{name: "anyres"})


def test_sixteen_bit_grey_is_scaled_and_an_unknown_scale_is_refused(tmp_path):
    processor_of_tiny = load_model("tiny", device="cpu")[1]
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    eight = Image.fromarray((ramp // 257).astype(np.uint8))
    found, expected = (
        processor_of_tiny.prepare_image(image) for image in (str(tmp_path / "grey.png"), eight)
    )
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff: grey values of mode 'F' have no known scale"):
        processor_of_tiny.prepare_image(str(tmp_path / "float.tiff"))


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    "size",
    [(2, 8000), (8000, 2), (3, 900), (1000, 7), (5, 257), (290, 4), (31, 257), (40, 57), (57, 40), (28, 28)],
)
def test_a_long_picture_is_cheap_and_the_same(aspect, size, tokenizer_model):
    """Against what the two layouts say, word by word: a square of the mean colour, or a crop of the resized picture."""
    processor = make_processor(tokenizer_model, image_aspect_ratio=aspect)
    rng = np.random.default_rng(size[0])
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    edge, (width, height) = 28, size
    prepared = processor.prepare_image(picture)
    if aspect == "pad":
        side = max(size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in MEAN))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        expected = square.resize((edge, edge), Image.Resampling.BICUBIC)
    else:
        target = int(edge * width / min(size)), int(edge * height / min(size))
        whole = picture.resize(target, Image.Resampling.BICUBIC)
        left, top = (target[0] - edge) // 2, (target[1] - edge) // 2
        expected = whole.crop((left, top, left + edge, top + edge))
        left, top = (prepared.width - edge) // 2, (prepared.height - edge) // 2
        assert prepared.width * prepared.height <= 4 * (width * height + edge**2)
        prepared = prepared.crop((left, top, left + edge, top + edge))
    difference = np.abs(np.asarray(prepared).astype(int) - np.asarray(expected))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_keeps_its_colours_or_is_refused_by_name(mode, processors):
    colours = Image.new("RGB", (28, 28), (200, 40, 90))
    grey = Image.new("L", (28, 28), 255)
    try:
        picture = grey if mode in ("1", "L", "LA", "La") else colours
        picture = picture.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode))
        picture = picture.convert(mode)
    except ValueError:
        picture = Image.new(mode, (28, 28))
    try:
        found = np.asarray(processors["image"].prepare_image(picture)).reshape(-1, 3)[0]
    except UserError as error:
        assert mode in ("LAB", "RGBa", "La", "PA") and "cannot be read as an image" in str(error)
    else:
        expected = (255, 255, 255) if mode in ("1", "L", "LA") else (200, 40, 90)
        assert np.abs(found.astype(int) - expected).max() <= 40, (mode, found)
