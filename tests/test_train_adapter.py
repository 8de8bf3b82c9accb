"""LoRA and QLoRA: what trains, what is saved, and that it loads, merges, goes on and evaluates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dynllava_plugin import load_model
from dynllava_plugin.cli import main as command
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.requests import Generation, Request
from dynllava_plugin.model.checkpoints.adapters import merge_adapter
from tests.training_kit import save_checkpoint, save_mixture
from train.arguments import AdapterArguments
from train.finetune import main
from train.trainer import DynamicLlavaTrainer

RECIPE = (
    "--global_batch_size 4 --max_steps 4 --learning_rate 1e-2 --predictor_learning_rate 1e-3 --lora_rank 4"
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapter")
    mixture, images = save_mixture(folder / "data")
    return [
        *("--model_name_or_path", str(save_checkpoint(folder / "checkpoint")), "--data_path", str(mixture)),
        *("--image_folder", str(images), "--data_cache", str(folder / "cache"), "--use_cpu"),
        *("--logging_steps", "1", "--report_to", "none", "--dataloader_num_workers", "0"),
        *("--per_device_train_batch_size", "4", "--save_steps", "2", *RECIPE.split()),
    ]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def peft_merged(flags: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """What peft itself makes of base and adapter."""
    from peft import PeftModel

    base, _ = load_model(flags[1], device="cpu")
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().state_dict()


def test_another_kind_of_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "x"}')
    with pytest.raises(UserError, match=r"adapter_config.json: no r and no lora_alpha, so it isn't a LoRA's"):
        merge_adapter(tmp_path, {}, torch.float32)


def test_only_adapter_and_predictors_are_saved_and_both_moved(flags, trained):
    adapter = load_file(trained / "adapter_model.safetensors")
    assert not (trained / "model.safetensors").exists()
    assert all("lora_" in name or "predictor" in name for name in adapter)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapter if "lora_" in name} == set(
        AdapterArguments().lora_targets
    )
    assert not any("vision_tower" in name for name in adapter)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    before = load_file(Path(flags[1]) / "model.safetensors")
    for part in ("image_predictor", "text_predictor"):
        names = [name for name in adapter if part in name]
        assert names and any(
            not torch.equal(adapter[name], before[name.removeprefix("base_model.model.")]) for name in names
        )


def test_loading_merges_as_peft_does(flags, trained, tmp_path):
    model, _ = load_model(trained, device="cpu")
    expected = peft_merged(flags, trained)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    before, _ = load_model(flags[1], device="cpu")
    name = "model.language_model.layers.3.mlp.down_proj.weight"
    assert not torch.equal(model.state_dict()[name], before.state_dict()[name])
    assert command(["convert", str(trained), str(tmp_path / "merged")]) == 0
    merged, processor = load_model(tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    (answer,) = Engine(merged, processor).generate(
        [Request("USER: is there ASSISTANT:")], Generation.from_task({"max_new_tokens": 2})
    )
    assert answer.generated_tokens <= 2


def test_an_interrupted_run_goes_on_to_the_same_adapter(flags, trained, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    for name in ("config.json", "adapter_model.safetensors", "checkpoint-4"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = folder / "run.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    assert main([*flags, "--output_dir", str(folder)]) == 0
    again, adapter = (load_file(path / "adapter_model.safetensors") for path in (folder, trained))
    assert again.keys() == adapter.keys()
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in again.items())


def test_another_base_is_refused(trained):
    with pytest.raises(UserError, match="no counterpart"):
        merge_adapter(trained, {}, torch.float32)
    base = load_file(Path(trained) / "adapter_model.safetensors")
    wrong = {
        name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight": torch.zeros(2, 2)
        for name in base
        if "lora_A" in name
    }
    with pytest.raises(UserError, match="shape"):
        merge_adapter(trained, wrong, torch.float32)


def test_in_image_mode_the_text_predictor_is_neither_trained_nor_saved(flags, tmp_path):
    more = ["--mode", "image", "--max_steps", "1", "--save_strategy", "no"]
    assert main([*flags, *more, "--output_dir", str(tmp_path / "out")]) == 0
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("image_predictor" in name for name in adapter)
    assert not any("text_predictor" in name for name in adapter)
    model, _ = load_model(tmp_path / "out", device="cpu")
    assert model.config.sparsity.mode == "image"


@pytest.mark.filterwarnings("error::UserWarning")  # as peft's of a base that it can't find on a hub
def test_an_image_run_from_a_checkpoint_without_predictors_has_none_for_text(flags, tmp_path, capsys, caplog):
    """Fresh ones are said once; an untrained text predictor isn't saved as if it were trained."""
    start = ["--model_name_or_path", "tiny", *flags[2:], "--mode", "image", "--max_steps", "1"]
    for name, rank in (("adapter", "2"), ("whole", "0")):
        out = tmp_path / name
        assert main([*start, "--lora_rank", rank, "--output_dir", str(out)]) == 0
        assert "tiny has no predictors: they start fresh" in capsys.readouterr().out
        model, _ = load_model(out, device="cpu")
        assert model._llm.text_predictor is None and not model.fresh_predictors
        with pytest.raises(UserError, match="needs an output-text predictor"):
            load_model(out, device="cpu", mode="image_text")
    assert "untrained" not in caplog.text


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"lora_rank": -1}, "--lora_rank"),
        ({"lora_targets": ["embed_tokens"]}, "--lora_targets embed_tokens"),
        ({"lora_dropout": 1.0}, "--lora_dropout"),
        ({"quantize": "4bit"}, "add --lora_rank"),
        ({"quantize": "2bit", "lora_rank": 4}, "--quantize 2bit"),
    ],
)
def test_what_makes_no_adapter(values, named):
    with pytest.raises(UserError, match=named):
        AdapterArguments(**values)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_trains_over_quantised_weights_and_loads_over_whole_ones(flags, tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made: list[Any] = []

    class Kept(DynamicLlavaTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.finetune.DynamicLlavaTrainer", Kept)
        quantized = ["--quantize", bits, "--save_strategy", "no", "--output_dir", str(out)]
        assert main([*flags, *quantized]) == 0
    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[bits]
    layers = made[0].dynamic.model.language_model.layers
    assert len([part for part in layers.modules() if isinstance(part, kind)]) == 4 * 7
    adapter = load_file(out / "adapter_model.safetensors")
    assert all(
        tensor.abs().max() > 0 and tensor.dtype == torch.float32
        for name, tensor in adapter.items()
        if "lora_B" in name
    )
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged, _ = load_model(out, device="cpu")
    expected = peft_merged(flags, out)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
