"""LoRA adapters: merged in the model's number type as peft merges, and as the published code writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dynllava_plugin import load_model
from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.model.checkpoints import load_without_processor
from dynllava_plugin.model.checkpoints.converting import published_name
from tests import fake_checkpoints as fake

RANK, ALPHA = 4, 12
TARGETS = r"model\.language_model\.layers\..*\.(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return fake.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def adapted(base, seed=0):
    """peft's model around `base`, its B not zero."""
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def merged_by_peft(model):
    return model.merge_and_unload().state_dict()


def lora_tensors(model):
    return {
        name.replace(".default", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def write_config(folder, base):
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none",
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "fan_in_fan_out": False, "modules_to_save": None,
        "target_modules": ["q_proj", "v_proj", "down_proj"], "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def own_adapter(folder):
    """An adapter of this package on `tiny`, and what peft makes of both in float32."""
    model, processor = load_model("tiny", device="cpu", dtype="float32")
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    predictors = {
        f"base_model.model.{name}": tensor.clone()
        for name, tensor in model.state_dict().items()
        if "predictor" in name
    }
    peft_model = adapted(model)
    save_file({**lora_tensors(peft_model), **predictors}, folder / "adapter_model.safetensors")
    write_config(folder, "tiny")
    return merged_by_peft(peft_model)


def test_the_sum_is_rounded_to_the_models_type_not_the_files(tmp_path):
    expected = own_adapter(tmp_path)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        found = load_without_processor(tmp_path, dtype=dtype, device="cpu").state_dict()
        for name, tensor in found.items():
            assert tensor.dtype == dtype
            difference = (tensor.float() - expected[name]).abs()
            assert (difference <= bound * expected[name].abs().clamp(min=1e-3)).all(), (dtype, name)


def published_lora(root: Path, tokenizer: Path, base: str = "published", suffix: str = "bin"):
    """What the published code's training with LoRA leaves in its folder, and the merged tensors by peft.

    It saves config.json, peft's two files, and in `non_lora_trainables.bin` every other trained parameter under its
    name in the wrapped model; no tokenizer.
    """
    source = fake.published(root, tokenizer)
    model = load_without_processor(source, device="cpu")
    folder = root / "lora"
    folder.mkdir()
    shutil.copy(source / "config.json", folder / "config.json")
    peft_model = adapted(model)
    generator = torch.Generator().manual_seed(1)
    trained = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" not in name and ("predictor" in name or "projector" in name):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            ours = name.removeprefix("base_model.model.")
            trained[f"base_model.model.{published_name(ours)}"] = parameter.detach().clone()
    lora = {
        name.replace("model.model.model.language_model.", "model.model.model."): tensor
        for name, tensor in lora_tensors(peft_model).items()
    }
    assert all(name.startswith("base_model.model.model.layers.") for name in lora)
    if suffix == "bin":
        torch.save(lora, folder / "adapter_model.bin")
    else:
        save_file(lora, folder / "adapter_model.safetensors")
    torch.save(trained, folder / "non_lora_trainables.bin")
    if base == "llama":
        _strip_to_llama(source)
    elif base == "original":
        fake.edit_config(source, sparse_config=None)
        fake.edit_weights(source, "predictor")
    write_config(folder, source)
    return folder, merged_by_peft(peft_model)


def _strip_to_llama(folder: Path) -> None:
    """What the original code's own LoRAs lie on: an LLM without vision tower, projector and predictors."""
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith(("model.layers", "model.embed", "model.norm", "lm_head"))
    }
    save_file(kept, folder / "model.safetensors")
    values = fake.read_json(folder / "config.json")
    values = {name: value for name, value in values.items() if not name.startswith(("mm_", "sparse"))}
    fake.write_json(folder / "config.json", {**values, "model_type": "llama"})


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("base", ["published", "original", "llama"])
def test_the_published_codes_lora_loads(base, suffix, tmp_path, tokenizer_model):
    folder, expected = published_lora(tmp_path, tokenizer_model, base, suffix)
    model, processor = load_model(folder, device="cpu")  # its tokenizer is the base's
    same(model.state_dict(), expected)
    assert processor.image_token_id == model.config.image_token_id
    assert main(["convert", str(folder), str(tmp_path / "own")]) == 0
    same(load_model(tmp_path / "own", device="cpu")[0].state_dict(), expected)


def test_older_names_of_what_was_trained_in_full(tmp_path, tokenizer_model):
    folder, expected = published_lora(tmp_path, tokenizer_model)
    trained = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    for prefix in ("", "model."):  # model.mm_projector..., model.model.mm_projector...
        renamed = {
            prefix + name.removeprefix("base_model.model."): tensor for name, tensor in trained.items()
        }
        torch.save(renamed, folder / "non_lora_trainables.bin")
        same(load_without_processor(folder, device="cpu").state_dict(), expected)


def test_on_an_original_llava_the_predictors_are_fresh(tmp_path, tokenizer_model, caplog):
    """LLaVA's own LoRA: no `sparse_config`, a projector and no predictors in its trained parameters."""
    folder, expected = published_lora(tmp_path, tokenizer_model, "llama")
    fake.edit_config(folder, sparse_config=None)
    trained = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save({n: t for n, t in trained.items() if "predictor" not in n}, folder / "non_lora_trainables.bin")
    found = load_without_processor(folder, device="cpu").state_dict()
    assert "untrained" in caplog.text
    for name, tensor in found.items():
        if "predictor" not in name:
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.mkdir, (self.trace,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_pickle_runs_nothing(name, tmp_path, tokenizer_model):
    folder, _ = published_lora(tmp_path, tokenizer_model)
    torch.save({"base_model.model.model.norm.weight": Bomb(tmp_path / "trace")}, folder / name)
    with pytest.raises(UserError, match=f"{name}: not a plain file of tensors, refused") as error:
        load_without_processor(folder, device="cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "trace").exists()


def test_damage_is_one_line(tmp_path, tokenizer_model):
    folder, _ = published_lora(tmp_path, tokenizer_model)
    trained = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save({**trained, "base_model.model.model.extra": torch.ones(1)}, folder / "non_lora_trainables.bin")
    with pytest.raises(UserError, match=r"1 not part of the model \(model.extra\)"):
        load_without_processor(folder, device="cpu")
    (folder / "non_lora_trainables.bin").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"non_lora_trainables.bin: not a plain file of tensors"):
        load_without_processor(folder, device="cpu")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors nor adapter_model.bin here"):
        load_without_processor(folder, device="cpu")
