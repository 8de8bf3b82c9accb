"""Projectors beside LLaVA-1.5's MLP: the TokenPacker as published (golden tensors), linear, deeper MLPs, none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from dynllava_plugin import DynamicLlavaForConditionalGeneration, load_model
from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints import load_without_processor
from dynllava_plugin.model.checkpoints.layouts import CLIP_L_336, read_config
from dynllava_plugin.model.checkpoints.weights import IGNORED, our_name
from dynllava_plugin.model.families.projectors import build_projector, tower_states
from tests import fake_checkpoints as fake
from tests.golden_case import GOLDEN, IMAGE_PLACE

PACKED = GOLDEN / "tokenpacker"
LOGITS = dict(rtol=0, atol=2e-5)
TOKENS = {2: 144, 4: 36}


@pytest.fixture(scope="module", params=[2, 4])
def scale(request):
    return request.param


@pytest.fixture(scope="module")
def model(scale):
    return load_without_processor(PACKED / f"scale{scale}")


@pytest.fixture(scope="module")
def golden(scale):
    return {
        **load_file(PACKED / f"golden_scale{scale}.safetensors"),
        **load_file(PACKED / "pixels.safetensors"),
    }


def prompt(model, golden):
    (ids,) = golden["prompt_ids"]
    place = int((ids == IMAGE_PLACE).nonzero())
    images = torch.full((model.config.image_seq_length,), model.config.image_token_id)
    return torch.cat([ids[:place], images, ids[place + 1 :]])[None]


@torch.no_grad()
def test_image_features_and_the_towers_states(model, golden, scale):
    outputs = model.model.get_image_features(golden["pixel_values"])
    assert model.config.image_seq_length == TOKENS[scale]
    torch.testing.assert_close(torch.stack(outputs.pooler_output), golden["image_features"], **LOGITS)
    if "tower_single" in golden:
        single, multi = tower_states(outputs.hidden_states, model.config.vision_feature_layer)
        torch.testing.assert_close(single, golden["tower_single"], **LOGITS)
        torch.testing.assert_close(multi, golden["tower_multi"], **LOGITS)
        features = model.model.multi_modal_projector(golden["tower_single"], golden["tower_multi"])
        torch.testing.assert_close(features, golden["image_features"], **LOGITS)


@torch.no_grad()
def test_prefill_and_cached_decoding_are_the_published(model, golden):
    vocab, seen = golden["prefill_logits"].shape[-1], []
    predictor = model.model.language_model.image_predictor
    hook = predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = model(prompt(model, golden), pixel_values=golden["pixel_values"], use_cache=True)
    hook.remove()
    torch.testing.assert_close(seen[0], golden["image_predictor_logits"], **LOGITS)
    torch.testing.assert_close(out.logits[..., :vocab], golden["prefill_logits"], **LOGITS)
    assert out.image_keep[0].nonzero()[:, 0].tolist() == golden["image_keep_index"][0].tolist()
    cache = out.past_key_values
    steps, lengths = [out.logits[:, -1]], [cache.kept_lengths()[:, 0]]
    for token in golden["forced_ids"]:
        out = model(token.view(1, 1), past_key_values=cache)
        steps.append(out.logits[:, -1])
        lengths.append(cache.kept_lengths()[:, 0])
    torch.testing.assert_close(torch.stack(steps, 1)[..., :vocab], golden["cached_logits"], **LOGITS)
    assert torch.equal(torch.stack(lengths), golden["cache_lengths"])


@torch.no_grad()
def test_scored_and_uncached_are_the_same(model, golden):
    ids, answer = prompt(model, golden), golden["forced_ids"][None]
    both = torch.cat([ids, answer], 1)
    labels = torch.cat([torch.full_like(ids, -100), answer], 1)
    scores = model.score(both, pixel_values=golden["pixel_values"], labels=labels)[:, ids.shape[1] :]
    expected = golden["cached_logits"][:, :-1].log_softmax(-1).gather(-1, answer[..., None])[..., 0]
    torch.testing.assert_close(scores, expected, **LOGITS)
    out = model(both, pixel_values=golden["pixel_values"], use_cache=False, prompt_length=ids.shape[1])
    found = out.logits[:, -1, : golden["cached_logits"].shape[-1]]
    torch.testing.assert_close(found, golden["cached_logits"][:, -1], **LOGITS)


def test_a_saved_model_is_the_same(model, golden, tmp_path):
    model.save_pretrained(tmp_path / "own")
    with torch.no_grad():
        expected = model(prompt(model, golden), pixel_values=golden["pixel_values"]).logits
        for read in (load_without_processor, AutoModelForImageTextToText.from_pretrained):
            again = read(tmp_path / "own").eval()
            assert again.config.image_seq_length == model.config.image_seq_length
            assert torch.equal(
                again(prompt(model, golden), pixel_values=golden["pixel_values"]).logits, expected
            )


def test_the_published_layout_comes_back_to_the_bit(scale, tmp_path, capsys):
    source = PACKED / f"scale{scale}"
    assert main(["convert", str(source), str(tmp_path / "own"), "--to", "dynamic"]) == 0
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "published"]) == 0
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert {name for name in before if not IGNORED.search(name)} == after.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    written, read = (fake.read_json(folder / "config.json") for folder in (tmp_path / "back", source))
    assert written["mm_projector_type"] == read["mm_projector_type"] == "tokenpacker"
    assert written["scale_factor"] == read["scale_factor"] == scale


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return fake.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_the_processor_makes_as_many_places_as_there_are_tokens(scale, tokenizer_model, tmp_path):
    folder = tmp_path / f"scale{scale}"
    shutil.copytree(PACKED / "clip", tmp_path / "clip")
    shutil.copytree(PACKED / f"scale{scale}", folder)
    shutil.copy(tokenizer_model, folder / "tokenizer.model")
    fake.edit_config(folder, vocab_size=fake.VOCABULARY)
    wider = {
        name: torch.cat([tensor, torch.zeros(fake.VOCABULARY - len(tensor), tensor.shape[1])])
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "embed_tokens" in name or "lm_head" in name
    }
    fake.edit_weights(folder, **wider)
    model, processor = load_model(folder, device="cpu")
    for saved in (False, True):
        if saved:
            model.save_pretrained(tmp_path / "own")
            processor.save_pretrained(tmp_path / "own")
            model, processor = load_model(tmp_path / "own", device="cpu")
        inputs = processor(
            images=[Image.new("RGB", (90, 40))], text=["USER: <image>\nis it?"], return_tensors="pt"
        )
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == TOKENS[scale]
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_a_policy_that_reduces_patches_is_refused(scale):
    with pytest.raises(UserError, match="visionzip: drops patches before the projector") as error:
        load_without_processor(PACKED / f"scale{scale}", policy="visionzip")
    assert "\n" not in str(error.value)


def test_a_tokenpacker_trains(model, golden):
    """Each of its tensors takes part, and a batch is each of its images alone."""
    images = torch.cat([golden["pixel_values"], golden["pixel_values"].flip(-1)])
    features = torch.stack(model.model.get_image_features(images).pooler_output)
    torch.testing.assert_close(features[:1], golden["image_features"], **LOGITS)
    features.square().sum().backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.zero_grad()


def with_projector(tmp_path, kind, weights):
    """The golden `mha` checkpoint with another projector, as the original code names its tensors."""
    folder = tmp_path / "published"
    shutil.copytree(GOLDEN / "mha" / "checkpoint", folder)
    shutil.copytree(GOLDEN / "mha" / "clip", tmp_path / "clip")
    fake.edit_config(folder, mm_projector_type=kind)
    named = {f"model.mm_projector.{name}": tensor for name, tensor in weights.items()}
    fake.edit_weights(folder, "mm_projector", **named)
    return folder


def mlp_as_published(depth):
    """The original code's module: nn.Sequential of linear layers with GELU between."""
    layers = [torch.nn.Linear(32, 48)]
    for _ in range(1, depth):
        layers += [torch.nn.GELU(), torch.nn.Linear(48, 48)]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp9x_gelu"])
@torch.no_grad()
def test_linear_and_mlps_of_any_depth(kind, tmp_path, capsys):
    torch.manual_seed(0)
    theirs = torch.nn.Linear(32, 48) if kind == "linear" else mlp_as_published(int(kind[3]))
    folder = with_projector(tmp_path, kind, theirs.state_dict())
    if kind == "linear":
        fake.edit_config(folder, mm_projector_type=None)  # the original code's default
    model = load_without_processor(folder)
    pixels = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2)
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    expected = theirs(tower.hidden_states[model.config.vision_feature_layer][:, 1:])
    found = torch.stack(model.model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(found, expected)
    assert main(["convert", str(folder), str(tmp_path / "own")]) == 0
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "published"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    named = {name: tensor for name, tensor in back.items() if "mm_projector" in name}
    assert named.keys() == {f"model.mm_projector.{name}" for name in theirs.state_dict()}
    assert fake.read_json(tmp_path / "back" / "config.json")["mm_projector_type"] == kind


@torch.no_grad()
def test_identity_needs_a_tower_as_wide_as_the_llm(tmp_path):
    folder = with_projector(tmp_path, "identity", {})
    with pytest.raises(
        UserError, match=r"config.json: an identity projector between a tower 32 wide and an LLM 48"
    ):
        load_without_processor(folder)
    config = load_without_processor(GOLDEN / "mha" / "checkpoint").config
    config.projector_type, config.text_config.hidden_size = "identity", 32
    model = DynamicLlavaForConditionalGeneration(config).eval()
    pixels = torch.randn(2, 3, *[config.vision_config.image_size] * 2)
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    found = torch.stack(model.model.get_image_features(pixels).pooler_output)
    assert torch.equal(found, tower.hidden_states[config.vision_feature_layer][:, 1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": None}, "scale factor that divides the tower's 24 patches a side, not None"),
        ({"scale_factor": 5}, "scale factor that divides the tower's 24 patches a side, not 5"),
        ({"scale_factor": "2"}, "scale factor that divides .*, not '2'"),
        ({"mm_vision_select_feature": "cls_patch"}, "patches alone"),
        (
            {"mm_projector_type": "resampler"},
            "projector 'resampler' is unknown; known are linear, mlpNx_gelu",
        ),
        ({"mm_projector_type": "mlp0x_gelu"}, "projector 'mlp0x_gelu' is unknown"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad' is not supported"),
        ({"image_aspect_ratio": "slice"}, "image_aspect_ratio 'slice' is not supported"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        ({"s2": True, "s2_scales": "336,672"}, "s2 .*336,672.* is not supported"),
        ({"s2_scales": "336,672,1008"}, "s2 .* is not supported"),
    ],
)
def test_what_a_config_asks_for_and_we_do_not_do_is_one_line(changes, message, tmp_path):
    shutil.copytree(PACKED / "clip", tmp_path / "clip")
    shutil.copytree(PACKED / "scale2", tmp_path / "scale2")
    fake.edit_config(tmp_path / "scale2", **changes)
    with pytest.raises(UserError, match=f"config.json: .*{message}") as error:
        load_without_processor(tmp_path / "scale2")
    assert "\n" not in str(error.value)


def test_a_tower_with_too_few_layers_is_one_line(tmp_path):
    folder = with_projector(tmp_path, "tokenpacker", {})
    fake.edit_config(folder, scale_factor=2)
    with pytest.raises(
        UserError, match="hidden states 12, 16, 22, 23 of a tower of 24 layers; this one has 3"
    ):
        load_without_processor(folder)


def test_settings_that_change_nothing_are_fine(tmp_path):
    shutil.copytree(PACKED / "clip", tmp_path / "clip")
    shutil.copytree(PACKED / "scale2", tmp_path / "scale2")
    fake.edit_config(tmp_path / "scale2", s2=False, s2_scales="336,672", mm_patch_merge_type="flat")
    assert load_without_processor(tmp_path / "scale2").config.projector_type == "tokenpacker"


@pytest.mark.parametrize("tower", ["/data/models/clip-vit-large-patch14-336", "./clip-vit-large-patch14-336"])
def test_the_usual_tower_in_a_folder_of_another_machine(tower, tmp_path):
    """As `mm_vision_tower` is in published TokenPacker checkpoints."""
    values = {**fake.read_json(PACKED / "scale2" / "config.json"), "mm_vision_tower": tower}
    config = read_config(tmp_path, values)
    assert (config.vision_config.hidden_size, config.image_seq_length) == (1024, 144)
    with torch.device("meta"):
        assert build_projector(config).clip_attn.num_heads == 8  # the published projector's
    here = tmp_path / Path(CLIP_L_336).name
    shutil.copytree(PACKED / "clip", here)
    small = read_config(tmp_path, {**values, "mm_vision_tower": str(here)})
    assert small.vision_config.hidden_size == 32  # a folder that is there counts


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mm_projector.weight", "multi_modal_projector.weight"),
        ("mm_projector.16.bias", "multi_modal_projector.linear_9.bias"),
        ("mm_projector.k_proj_1.0.weight", "multi_modal_projector.k_proj_1.0.weight"),
        ("mm_projector.clip_attn.in_proj_bias", "multi_modal_projector.clip_attn.in_proj_bias"),
    ],
)
def test_names(theirs, ours):
    assert our_name(f"model.{theirs}") == f"model.{ours}" == our_name(f"model.{ours}")
