"""`load_model` reads every layout as the same model; damaged, unknown or dangerous files are one line."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dynllava_plugin import DynamicLlavaForConditionalGeneration, load_model
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints import load_without_processor
from dynllava_plugin.model.checkpoints.layouts import CLIP_L_336, read_config
from dynllava_plugin.model.checkpoints.weights import our_name
from dynllava_plugin.model.configuration import fresh_sparsity
from dynllava_plugin.model.processing import DynamicLlavaProcessor
from dynllava_plugin.model.prompts import vicuna_v1, with_images
from tests import fake_checkpoints as fake

GOLDEN = fake.GOLDEN
Builder = Callable[[Path, Path], Path]


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def published(tmp_path: Path, tokenizer_model: Path) -> Path:
    return fake.published(tmp_path, tokenizer_model)


def prompt_and_image() -> dict[str, Any]:
    image = Image.linear_gradient("L").resize((90, 40))
    return {
        "images": [image],
        "text": [vicuna_v1([(with_images("What color is it?"), "red"), ("And this?", None)])],
    }


@torch.no_grad()
def run(folder: Path, **settings: Any) -> Any:
    model, processor = load_model(folder, device="cpu", **settings)
    inputs = processor(**prompt_and_image(), return_tensors="pt")
    return inputs["input_ids"], model(**inputs)


LAYOUTS: dict[str, Builder] = {
    "published": fake.published,
    "published sharded": lambda root, tokenizer: fake.as_shards(fake.published(root, tokenizer)),
    "published .bin": lambda root, tokenizer: fake.as_pytorch(fake.published(root, tokenizer)),
    "published sharded .bin": lambda root, tokenizer: fake.as_shards(fake.published(root, tokenizer), "bin"),
    "original": fake.original,
    "original .bin": lambda root, tokenizer: fake.as_pytorch(fake.original(root, tokenizer)),
    "llava-hf": fake.llava_hf,
    "llava-hf, transformers 5 names": lambda root, tokenizer: fake.llava_hf(
        root, tokenizer, fake.TRANSFORMERS_5_NAMES
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(layout: str, tmp_path: Path, tokenizer_model: Path) -> None:
    # the reference: the golden weights' own layout, and the rule for "▁" that llava-hf's tokenizers record
    reference = fake.published(tmp_path / "reference", tokenizer_model)
    fake.write_json(reference / "tokenizer_config.json", {"legacy": False})
    ids, expected = run(reference, mode="full")
    folder = LAYOUTS[layout](tmp_path, tokenizer_model)
    fake.write_json(folder / "tokenizer_config.json", {**tokenizer_settings(folder), "legacy": False})
    aspect = {} if "hf" not in layout else {"image_aspect_ratio": "pad"}
    fake.edit_config(folder, **aspect)
    found_ids, found = run(folder, mode="full")
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found.logits[..., : fake.VOCABULARY], expected.logits[..., : fake.VOCABULARY])


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return fake.read_json(file) if file.is_file() else {}


@pytest.mark.parametrize("case", ["mha", "gqa", "image-only"])
def test_published_weights_decide_as_published(case: str) -> None:
    model = load_without_processor(GOLDEN / case / "checkpoint", device="cpu")
    golden = load_file(GOLDEN / case / "golden.safetensors")
    place = int((golden["prompt_ids"][0] == -200).nonzero())
    before, after = golden["prompt_ids"][0, :place], golden["prompt_ids"][0, place + 1 :]
    tokens = golden["image_features"].shape[1]
    ids = torch.cat([before, torch.full((tokens,), model.config.image_token_id), after])[None]
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=golden["pixel_values"])
    torch.testing.assert_close(out.logits[..., :96], golden["prefill_logits"], atol=2e-5, rtol=0)
    assert torch.equal(out.image_keep[0].nonzero().flatten(), golden["image_keep_index"].flatten())
    assert model.config.sparsity.mode == ("image" if case == "image-only" else "image_text")


def test_published_settings_become_ours(published: Path) -> None:
    model, processor = load_model(published, device="cpu")
    sparsity = model.config.sparsity
    assert (sparsity.predictor_dim, sparsity.predictor_heads, sparsity.predictor_ffn_dim) == (32, 4, 128)
    assert (sparsity.sparse_layer, sparsity.vision_keep_rate, sparsity.min_text_length) == (2, 0.2, 12)
    assert model.dtype == torch.float32 and not model.training
    assert processor.image_aspect_ratio == model.config.image_aspect_ratio == "pad"


def test_new_vocabulary_rows_disturb_nothing(published: Path) -> None:
    model, processor = load_model(published, device="cpu")
    tokens = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<pad>")}
    assert tokens == {"<image>": fake.VOCABULARY, "<pad>": fake.VOCABULARY + 1}
    assert model.config.image_token_id == processor.image_token_id == fake.VOCABULARY
    weights = load_file(published / "model.safetensors")
    assert torch.equal(model.lm_head.weight[: fake.VOCABULARY], weights["lm_head.weight"])
    assert torch.equal(
        model.get_input_embeddings().weight[: fake.VOCABULARY], weights["model.embed_tokens.weight"]
    )
    inputs = processor(**prompt_and_image(), return_tensors="pt")
    probabilities = model(**inputs).logits.softmax(-1)
    assert probabilities[..., fake.VOCABULARY :].max() == 0
    assert model.generate(**inputs, max_new_tokens=30, do_sample=True).max() <= fake.VOCABULARY


@pytest.mark.parametrize("build", [fake.original, fake.llava_hf])
def test_fresh_predictors_are_said_once(
    build: Builder, tmp_path: Path, tokenizer_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path, tokenizer_model)
    with caplog.at_level(logging.WARNING, logger="dynllava_plugin"):
        _, out = run(folder)
    assert [record.message.count("untrained") for record in caplog.records] == [1]
    assert out.image_keep.sum() == 12  # floor(0.2 * 64)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dynllava_plugin"):
        run(folder, mode="full")
    assert not caplog.records


def test_fresh_predictors_fit_the_model() -> None:
    sizes = {width: fresh_sparsity(width) for width in (48, 192, 1024, 4096)}
    assert [size.predictor_dim for size in sizes.values()] == [16, 64, 512, 512]
    assert [size.predictor_heads for size in sizes.values()] == [4, 4, 8, 8]


@pytest.mark.parametrize("built", [False, True])
def test_own_layout_round_trips(built: bool, published: Path, tmp_path: Path) -> None:
    model, processor = load_model(published, device="cpu", vision_keep_rate=0.3)
    if built:
        weights = model.state_dict()
        model = DynamicLlavaForConditionalGeneration(model.config).eval()  # saves under other names
        model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    again, processor_again = load_model(tmp_path / "own", device="cpu")
    assert again.config.sparsity == model.config.sparsity and again.config.sparsity.vision_keep_rate == 0.3
    inputs = processor(**prompt_and_image(), return_tensors="pt")
    for key, value in processor_again(**prompt_and_image(), return_tensors="pt").items():
        assert torch.equal(value, inputs[key])
    automatic = AutoModelForImageTextToText.from_pretrained(tmp_path / "own")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "own"), DynamicLlavaProcessor)
    for other in (again, automatic.eval()):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_tiny_keeps_its_own_token_ids(tmp_path: Path) -> None:
    model, processor = load_model("tiny", device="cpu", vision_keep_rate=0.5)
    inputs = processor(**prompt_and_image(), return_tensors="pt")
    folder = files("dynllava_plugin") / "assets" / "tiny_llava"
    as_trained = AutoProcessor.from_pretrained(str(folder))(**prompt_and_image(), return_tensors="pt")
    assert torch.equal(inputs["input_ids"], as_trained["input_ids"])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    assert model(**inputs).image_keep.sum() == 32
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again, processor_again = load_model(tmp_path, device="cpu")
    assert torch.equal(
        processor_again(**prompt_and_image(), return_tensors="pt")["input_ids"], inputs["input_ids"]
    )
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_importing_the_package_registers_it(published: Path, tmp_path: Path) -> None:
    model, processor = load_model(published, device="cpu")
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    program = (
        "import sys, dynllava_plugin;"
        "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor;"
        "for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):"
        "    print(type(auto.from_pretrained(sys.argv[1])).__name__)"
    ).replace(";", "\n")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "own")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        "DynamicLlavaConfig",
        "DynamicLlavaForConditionalGeneration",
        "DynamicLlavaProcessor",
    ]


def test_harmless_weights_are_ignored_and_unused_ones_optional(published: Path) -> None:
    _, expected = run(published)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(65)[None],
        "model.instruct_score_predictor.output_mlp.0.weight": torch.ones(48),
    }
    fake.edit_weights(published, remove="post_layernorm", **extra)
    fake.edit_weights(published, remove="vision_model.encoder.layers.2.")
    _, found = run(published)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: fake.edit_weights(folder, "layers.1.mlp.up_proj"),
            "1 missing .*layers.1.mlp.up_proj.weight",
        ),
        (lambda folder: fake.edit_weights(folder, "encoder.layers.0."), "16 missing .*, ..."),
        (lambda folder: fake.edit_weights(folder, "image_score_predictor"), "32 missing .*image_predictor"),
        (lambda folder: fake.edit_weights(folder, "_score_predictor"), "missing .*image_predictor"),
        (lambda folder: fake.edit_weights(folder, extra=torch.ones(1)), "1 not part of the model .*extra"),
        (
            lambda folder: fake.edit_weights(folder, **{"model.norm.weight": torch.ones(3)}),
            r"norm.weight has shape \[3\]",
        ),
        (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors: truncated"),
        (
            lambda folder: (fake.as_shards(folder) / "model-00002-of-00003.safetensors").unlink(),
            "00002.*: missing",
        ),
        (
            lambda folder: truncate(fake.as_shards(folder) / "model.safetensors.index.json"),
            "not a weight index",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights here"),
        (
            lambda folder: truncate(fake.as_pytorch(folder) / "pytorch_model.bin"),
            "pytorch_model.bin: not a plain file",
        ),
        (lambda folder: (folder / "tokenizer.model").unlink(), "no tokenizer here"),
        (lambda folder: truncate(folder / "tokenizer.model"), "tokenizer cannot be read"),
        (lambda folder: truncate(folder / "config.json"), "config.json: not a readable JSON file"),
        (
            lambda folder: (folder / "config.json").write_text("[" * 100_000),
            "config.json: not a readable JSON file",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: fake.edit_config(folder, model_type="bert"), "model_type 'bert'"),
        (lambda folder: fake.edit_config(folder, model_type=["llava"]), r"model_type \['llava'\]"),
        (
            lambda folder: fake.edit_config(folder, mm_projector_type="resampler"),
            "projector 'resampler' is unknown",
        ),
        (lambda folder: fake.edit_config(folder, image_aspect_ratio="anyres"), "image_aspect_ratio 'anyres'"),
        (
            lambda folder: fake.edit_config(folder, mm_vision_select_feature="cls"),
            "mm_vision_select_feature 'cls'",
        ),
        (lambda folder: fake.edit_config(folder, vocab_size=300), "420 tokens, its model only 300"),
        (lambda folder: fake.edit_config(folder, mm_vision_tower="../nowhere"), r"\.\./nowhere: no such"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("{"),
            "processor's files are missing or damaged",
        ),
        (
            lambda folder: fake.edit_config(folder, sparse_config={"vision_keep_rate": 2}),
            "sparse_config: vision_keep_rate",
        ),
    ],
)
def test_damage_is_one_line(damage: Callable[[Path], Any], message: str, published: Path) -> None:
    damage(published)
    with pytest.raises(UserError, match=message) as error:
        load_model(published, device="cpu")
    assert "\n" not in str(error.value)


def test_an_llm_that_is_not_supported_is_one_line(tmp_path: Path, tokenizer_model: Path) -> None:
    folder = fake.llava_hf(tmp_path, tokenizer_model)
    text = fake.read_json(folder / "config.json")["text_config"]
    for kind in ("gpt2", "one_of_tomorrow"):
        fake.edit_config(folder, text_config={**text, "model_type": kind})
        with pytest.raises(
            UserError, match=f"config.json: text_config: the LLM is a {kind}, supported are llama"
        ):
            load_model(folder, device="cpu")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Bomb:
    """Pickles to a command that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_runs_nothing(published: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"model.norm.weight": Bomb(trace)}, published / "pytorch_model.bin")
    (published / "training_args.bin").write_bytes(pickle.dumps(Bomb(trace)))
    load_model(published, device="cpu")  # safetensors beside it: not opened at all
    (published / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model.bin: not a plain file of tensors, refused"):
        load_model(published, device="cpu")
    assert not trace.exists()
    pickle.loads((published / "training_args.bin").read_bytes())
    assert trace.exists()  # the trap works


def test_an_index_cannot_leave_its_folder(published: Path, tmp_path: Path) -> None:
    shutil.copy(published / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (published / "model.safetensors").unlink()
    for name, message in (("../elsewhere.safetensors", "outside its folder"), (5, "5: missing, though")):
        index = {"weight_map": {"lm_head.weight": name}}
        fake.write_json(published / "model.safetensors.index.json", index)
        with pytest.raises(UserError, match=message):
            load_model(published, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "images"}, "mode: unknown value 'images'"),
        ({"vision_keep_rate": 0.0}, "vision_keep_rate: 0.0 is outside"),
        ({"text_keep_rate": 1.5}, "text_keep_rate"),
        ({"sparse_layer": 5}, "sparse_layer: 5 is outside the model"),
        ({"keep": 1}, "keep: no such sparsity setting"),
        ({"predictor_dim": 64}, r"has shape \[.*\], but"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "gpu0"}, "device: 'gpu0'"),
        ({"attn_implementation": "magic"}, "attn_implementation"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str, published: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_model(published, **{"device": "cpu", **settings})
    assert "\n" not in str(error.value)


def test_dtype(published: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model, _ = load_model(published, device="cpu", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    fake.edit_config(published, torch_dtype="float16")
    assert load_without_processor(published, device="cpu").dtype == torch.float16


def test_the_usual_vision_tower_is_known_without_a_download(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fake.edit_config(published, mm_vision_tower=CLIP_L_336)
    config = read_config(published, fake.read_json(published / "config.json"))
    assert (
        config.image_seq_length,
        config.vision_config.image_size,
        config.vision_config.num_hidden_layers,
    ) == (576, 336, 24)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "./nowhere", "/nowhere/at/all", "nowhere", __file__])
def test_what_is_not_there_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=name) as error:
        load_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "language_model.model.layers.3.mlp.up_proj.weight",
            "model.language_model.layers.3.mlp.up_proj.weight",
        ),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        (
            "model.image_score_predictor.transformer.1.attn.qkv.weight",
            "model.language_model.image_predictor.blocks.1.qkv_proj.weight",
        ),
        (
            "model.output_text_score_predictor.output_mlp.7.bias",
            "model.language_model.text_predictor.head.4.bias",
        ),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    assert our_name(theirs) == ours
    assert our_name(ours) == ours  # our own names stay
