"""Every file of train/configs: presets give every argument, accelerate's configs mean what their names say."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainingArguments

from dynllava_plugin.errors import UserError
from train import budgets, easy_vqa
from train.arguments import AdapterArguments, DataArguments, ModelArguments, RecipeArguments
from train.command_line import parse
from train.sharding import FSDP, WHOLE, sharding

CONFIGS = Path(__file__).parents[1] / "train" / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
ACCELERATE = sorted(path.name for path in (CONFIGS / "accelerate").glob("*.yaml"))
PAPER = {"sparse_layer": 2, "vision_keep_rate": 0.2, "text_keep_rate": 0.5, "keep_loss_weight": 100.0}
PAPER |= {"learning_rate": 5e-6, "predictor_learning_rate": 2e-4, "global_batch_size": 64, "tau_end": 0.1}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def preset(name: str, *more: str):
    given = [
        "--data_path",
        "x.json",
        "--image_folder",
        "x",
        "--output_dir",
        "x",
        "--use_cpu",
        "--report_to",
        "none",
    ]
    return parse([str(CONFIGS / name), *given, *more])


def test_the_presets_are_there():
    assert PRESETS == [
        "dynamic_llava_13b.yaml",
        "dynamic_llava_7b.yaml",
        "dynamic_llava_7b_lora.yaml",
        "tiny.yaml",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_every_argument_and_parses(name):
    given = yaml.safe_load((CONFIGS / name).read_text())
    inherited = {field.name for field in fields(TrainingArguments)}
    ours = [
        field.name for kind in (ModelArguments, DataArguments, AdapterArguments) for field in fields(kind)
    ]
    ours += [field.name for field in fields(RecipeArguments) if field.name not in inherited]
    ours += list(RecipeArguments.__annotations__)
    assert set(ours) <= set(given), set(ours) - set(given)
    lines = [line for line in (CONFIGS / name).read_text().splitlines() if line and line[0] not in "# "]
    assert len(lines) == len(given) and [line for line in lines if "  # " not in line] == []
    parsed = {key: value for part in preset(name) for key, value in vars(part).items()}
    for key, value in given.items():
        if value is not None and key != "report_to":
            assert parsed[key] == value or key == "vision_keep_rate", key


def test_the_7b_and_13b_presets_are_the_papers_recipe():
    for name in ("dynamic_llava_7b.yaml", "dynamic_llava_13b.yaml"):
        parsed = {key: value for part in preset(name) for key, value in vars(part).items()}
        parsed |= preset(name)[0].sparsity()
        assert {key: parsed[key] for key in PAPER} == PAPER and "later_gates" not in parsed
        assert parsed["num_train_epochs"] == 1 and parsed["warmup_steps"] == 0.03 and parsed["bf16"]
        # The published script's order, averaging, clipping and freezing (docs/training.md has the table).
        assert parsed["train_sampling_strategy"] == "random" and parsed["loss_average"] == "batches"
        assert parsed["max_grad_norm"] == 0 and parsed["train_projector"] is False
        assert parsed["per_device_train_batch_size"] == (8 if "7b" in name else 4) and not parsed["text_only"]
        assert parsed["weight_decay"] == 0 and parsed["lr_scheduler_type"] == "cosine"
        assert parsed["model_max_length"] == 2048 and "prompt_predictor" not in parsed
    _, _, recipe, adapter = preset("dynamic_llava_7b_lora.yaml")
    assert adapter.lora_rank == 128 and recipe.predictor_learning_rate == 2e-4


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_global_batch_is_kept_whatever_the_world_size(name, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 0)
    size = yaml.safe_load((CONFIGS / name).read_text())["global_batch_size"]
    batch = min(4, size // world)
    recipe = preset(name, "--per_device_train_batch_size", str(batch))[2]
    assert recipe.gradient_accumulation_steps * batch * world == size
    with pytest.raises(UserError, match=f"x {world} process"):
        preset(name, "--per_device_train_batch_size", str(size)) if world > 1 else preset(
            name, "--per_device_train_batch_size", "5"
        )


def test_the_command_line_overrides_a_preset():
    model, _, recipe, _ = preset("tiny.yaml", "--vision_keep_rate", "0.1", "--seed", "7")
    assert model.sparsity()["vision_keep_rate"] == 0.1 and recipe.seed == 7


def test_memory_is_pinned_for_a_device_only():
    recipe = preset("tiny.yaml", "--use_cpu", "false")[2]
    assert recipe.dataloader_pin_memory == torch.accelerator.is_available()


def launched(name: str, monkeypatch) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` gives its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(CONFIGS / "accelerate" / name), "train/finetune.py", "preset.yaml"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def test_what_a_checkpoint_belongs_to_is_what_the_launcher_says(monkeypatch):
    recipe = preset("tiny.yaml")[2]
    assert sharding(recipe) == WHOLE
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding(recipe) == FSDP
    recipe.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    assert sharding(recipe) == "DeepSpeed ZeRO-3 with 1 process(es)"


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_takes_every_config(name, monkeypatch):
    environment = launched(name, monkeypatch)
    for key, value in environment.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # left to --bf16
    stage = name.removesuffix(".yaml").removesuffix("_offload")
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == stage.startswith("zero")
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2.yaml")
    device = "cpu" if "offload" in name else "none"
    if stage.startswith("zero"):
        pytest.importorskip("deepspeed")
        from accelerate.utils import DeepSpeedPlugin

        monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
        settings = DeepSpeedPlugin().deepspeed_config
        zero = settings["zero_optimization"]
        assert zero["stage"] == int(stage[-1]) and zero["offload_optimizer"]["device"] == device
        assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"
        if stage == "zero3":
            assert zero["offload_param"]["device"] == device
            assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    if name == "fsdp2.yaml":
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.transformer_cls_names_to_wrap is None  # the trainer names the LLM's layers


def test_the_configs_that_the_presets_name_are_there():
    assert {"one_gpu.yaml", "ddp.yaml", "zero2.yaml", "zero2_offload.yaml", "zero3.yaml"} <= set(ACCELERATE)
    assert {"zero3_offload.yaml", "fsdp2.yaml"} <= set(ACCELERATE)
    for name in PRESETS:
        words = (CONFIGS / name).read_text().split()
        named = [word for word in words if word.startswith("train/configs/accelerate/")]
        assert named and all(os.path.exists(CONFIGS.parents[1] / word) for word in named)


ROOT = CONFIGS.parents[1]


def typed(page: str, script: str) -> list[tuple[str, str]]:
    """What a page tells a reader to type of a script, with what stands behind #: continued lines as one, variables filled in."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    variables = dict(re.findall(r'^    ([A-Z]+)="(.*)"$', text, re.MULTILINE))
    lines = [line.partition("  #") for line in re.findall(rf"^    (.*{script}.*)$", text, re.MULTILINE)]
    for name, value in variables.items():
        lines = [(line.replace(f"${name}", value), mark, note) for line, mark, note in lines]
    return [(line.replace(" ...", ""), note) for line, _, note in lines]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_what_the_pages_tell_to_type_is_understood(page, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 0)
    monkeypatch.chdir(ROOT)
    commands = typed(page, "train/finetune.py")
    assert len(commands) > 1
    for command, note in commands:
        for placeholder, meant in (("LAUNCH", "zero2"), ("PRESET", "dynamic_llava_7b")):
            command = command.replace(placeholder, meant)
        launcher, _, flags = command.partition("train/finetune.py")
        *_, launch = re.findall(r"--config_file (\S+)", launcher)
        (processes,) = re.findall(r"--num_processes (\d+)", launcher)[-1:] or [
            yaml.safe_load(Path(launch).read_text())["num_processes"]
        ]
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        missing = [f"--{name}" for name in ("data_path", "image_folder", "output_dir") if name not in flags]
        recipe = parse([*flags.split(), *(word for flag in missing for word in (flag, "x"))])[2]
        if sum_ := re.search(r"64 = (\d+) x (\d+) x (\d+)", note):
            layout = recipe.per_device_train_batch_size, int(processes), recipe.gradient_accumulation_steps
            assert tuple(map(int, sum_.groups())) == layout


def test_the_scripts_of_the_page_take_what_it_tells_to_type():
    for script, module in (("train/easy_vqa.py", easy_vqa), ("train/budgets.py", budgets)):
        ((command, _),) = typed("docs/training.md", script)
        module.parse_arguments(command.split(script)[1].split())


def test_each_row_of_the_recipes_table_names_a_test_that_is_there():
    named = re.findall(r"`(test_\w+)` \|$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) == 9 and [name for name in named if f"def {name}(" not in tests] == []
