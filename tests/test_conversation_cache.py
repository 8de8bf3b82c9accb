"""A conversation over one cache: four turns, each as the whole conversation fed anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dynllava_plugin import Conversation, load_model
from dynllava_plugin.errors import UserError
from tests.families.checkpoints import FAMILIES, write_checkpoint


def boxes(color: str) -> Image.Image:
    image = Image.new("RGB", (84, 84), "white")
    image.paste(color, (10, 20, 50, 70))
    return image


TURNS = [
    ("What is in the picture?", ["red"]),
    ("Describe the image in detail.", []),
    ("And here?", ["blue"]),
    ("Is it red?", []),
]
NOT_PIXELS = ("input_ids", "attention_mask", "mm_token_type_ids")


def fed_anew(talk: Conversation, turn: int, images: list[Image.Image], **settings: Any) -> list[int]:
    """`generate`'s answer of a turn, behind all that the conversation had before it."""
    content = [{"type": "image", "image": image} for image in images]
    pixels = talk.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    start = talk.spans[turn][0]
    ids, output = talk.ids[:, :start], torch.zeros(1, start, dtype=torch.bool)
    for first, last in talk.spans[:turn]:
        output[:, first:last] = True
    inputs = {key: value for key, value in pixels.items() if key not in NOT_PIXELS}
    found = talk.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_mask=output, **inputs, **settings
    )
    return found[0, start:].tolist()


def four_turns(
    model: Any, processor: Any, policy: str | None = None, new: int = 8, turns: Any = TURNS
) -> Conversation:
    """Talk, and hold each turn against the whole conversation fed anew."""
    settings = {"max_new_tokens": new, "do_sample": False}
    talk, images = Conversation(model, processor, policy, **settings), []
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    for turn, (question, colors) in enumerate(turns):
        before = talk.ids.shape[1]
        answer = talk.ask(question, *map(boxes, colors))
        assert talk.answers[-1] == answer and talk.cache.seen == talk.ids.shape[1]
        assert question in processor.tokenizer.decode(talk.ids[0, before:])
        images += map(boxes, colors)
        start, end = talk.spans[turn]
        found = fed_anew(talk, turn, images, policy=policy, **settings)
        assert [token for token in found if token not in ends] == talk.ids[0, start:end].tolist()
    return talk


@pytest.mark.parametrize("policy", ["full", "image", "image_text"])
def test_four_turns_are_those_of_the_whole_conversation(policy: str) -> None:
    model, processor = load_model("tiny", device="cpu", policy="full")
    talk = four_turns(model, processor, policy)
    assert len(set(talk.answers)) > 2 and len({end - start for start, end in talk.spans}) > 1
    # As the template writes them, and each image's tokens were chosen once.
    turns = [
        {"role": role, "content": [*[{"type": "image"}] * count, {"type": "text", "text": text}]}
        for (question, colors), answer in zip(TURNS, talk.answers, strict=True)
        for role, count, text in (("user", len(colors), question), ("assistant", 0, answer))
    ]
    written = processor(
        images=[boxes(color) for _, colors in TURNS for color in colors],
        text=[processor.apply_chat_template(turns, tokenize=False).removesuffix("</s>")],
        return_tensors="pt",
    )
    assert talk.ids.tolist() == written["input_ids"].tolist()
    held = talk.cache.kept_lengths()[:, 0].tolist()
    assert held[0] == talk.ids.shape[1] and (held[-1] == held[0]) == (policy == "full")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    model, processor = load_model(str(write_checkpoint(family, tmp_path)), device="cpu", policy="image")
    # OneVision cuts an image that comes alone into tiles, and several together not: the second one would be another.
    turns = [(question, colors if not turn or family != "llava_onevision" else [])
             for turn, (question, colors) in enumerate(TURNS)]  # fmt: skip
    four_turns(model, processor, new=3, turns=turns)


def test_text_moves_up_by_what_every_image_lost_before_the_llm() -> None:
    model, processor = load_model("tiny", device="cpu", policy="full")
    talk = four_turns(model, processor, "divprune,keep=0.3,positions=packed")
    assert talk.cache is not None and int(talk.cache.moved_up) == 2 * (64 - 19)


def test_a_cache_that_lets_tokens_go_counts_those_of_every_image() -> None:
    model, processor = load_model("tiny", device="cpu", policy="image+h2o,image.keep=0.25")
    talk = Conversation(model, processor, max_new_tokens=3)
    for turn, (question, _) in enumerate(TURNS):
        talk.ask(question, *([boxes("red")] if turn in (0, 2) else []))
        assert talk.cache is not None and int(talk.cache.images_kept) == (16 if turn < 2 else 32)


def test_what_goes_wrong_is_one_line() -> None:
    model, processor = load_model("tiny", device="cpu", policy="image")
    talk = Conversation(model, processor, max_new_tokens=3)
    with pytest.raises(UserError, match="policy: unknown value 'x'"):
        Conversation(model, processor, "x").ask("What?")
    first = talk.ask("What is in the picture?", boxes("red"))
    with pytest.raises(UserError, match="of 2048; start a new conversation"):
        talk.ask("word " * 2100)
    assert first and talk.ask("Is it red?")
    talk.cache.note(1, None)
    with pytest.raises(UserError, match="cut short; start a new conversation"):
        talk.ask("Is it red?")
    inputs = processor(text=["USER: <image>\nWhat? ASSISTANT:"], images=[boxes("red")], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[5, 6]])], 1)
    with pytest.raises(UserError, match="a turn behind a cache brings its own images, not those of earlier"):
        model.generate(ids, pixel_values=inputs["pixel_values"], past_key_values=out.past_key_values)


def test_what_the_readme_types(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    first, talk, *_ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    first = (
        first.replace("Osilly/Dynamic-LLaVA-7B", "tiny").replace("cuda", "cpu").replace("bfloat16", "float32")
    )
    monkeypatch.chdir(tmp_path)
    boxes("red").save("photo.jpg")
    names: dict[str, Any] = {"image": boxes("red")}
    exec(first, names)
    answer, *lengths, score = capsys.readouterr().out.splitlines()
    assert (
        answer and len(lengths) == names["model"].config.text_config.num_hidden_layers and "tensor(-" in score
    )
    assert names["model"].config.sparsity.mode == "image"
    exec("from dynllava_plugin import Conversation\n" + talk, names)
    assert capsys.readouterr().out.count("\n") == 2
