"""What is refused before a run starts: one line that names the flag, file or sample, and exit code 2."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.training_kit import conversation, save_checkpoint, save_mixture
from train.finetune import main, one_line

GOOD = {"id": "good", "image": "0.png", "conversations": conversation(("<image>\nwhat", "a"), ("which", "b"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("data") / "data")


def refuse(capsys, *flags: str) -> str:
    """Run the command, which must fail, and return its one line."""
    assert main(list(flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def command(data, tmp_path, *flags: str) -> list[str]:
    mixture, images = data
    given = ["--model_name_or_path", "tiny", "--data_path", str(mixture), "--image_folder", str(images)]
    given += ["--data_cache", str(tmp_path / "cache")]
    return [*given, "--output_dir", str(tmp_path / "out"), "--use_cpu", *flags]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--vision_keep_rate 0", "vision_keep_rate"),
        ("--text_keep_rate 1.2", "text_keep_rate"),
        ("--vision_keep_rate nan", "vision_keep_rate"),
        ("--vision_keep_rate many", "--vision_keep_rate"),
        ("--vision_keep_rate 0.5:0.1", "does not rise"),
        ("--vision_keep_rate 0.5:many", "--vision_keep_rate 0.5:many"),
        ("--gates 2", "--gates 2: must be LAYER:RATE"),
        ("--gates 3:0.5,2:0.5", "layers must rise"),
        ("--gates 2:0.5,3:0.5 --vision_keep_rate 0.1:0.5", "--gates: its first rate"),
        ("--gates 2:0.5,99:0.5", "outside the model"),
        ("--sparse_layer 0", "sparse_layer"),
        ("--mode full", "--mode"),
        ("--mode none", "mode"),
        ("--vision_keep_rat 0.1", "did you mean --vision_keep_rate"),
        ("--no_such_thing", "--no_such_thing"),
        ("--global_batch_size 12 --per_device_train_batch_size 8", "--global_batch_size 12"),
        ("--global_batch_size 4 --per_device_train_batch_size 8", "--global_batch_size 4"),
        ("--gradient_accumulation_steps 3", "--gradient_accumulation_steps 3"),
        ("--learning_rate -1", "--learning_rate"),
        ("--predictor_learning_rate 0", "--predictor_learning_rate"),
        ("--lr_scheduler_type spiral", "spiral"),
        ("--seed -1", "--seed -1"),
        ("--data_seed -3", "--data_seed -3"),
        ("--save_steps 0", "--save_steps 0"),
        ("--held_out 1 --eval_steps 0", "--eval_steps 0"),
        ("--save_only_model true", "--save_only_model true"),
        ("--remove_unused_columns true", "--remove_unused_columns true"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1"),
        ("--auto_find_batch_size true", "--auto_find_batch_size true"),
        ("--load_best_model_at_end true", "--load_best_model_at_end true"),
        ("--metric_for_best_model eval_ppl", "--metric_for_best_model eval_ppl"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "--lr_scheduler_type reduce_lr_on_plateau: follows"),
        ("--save_strategy best", "--save_strategy best"),
        ("--learning_rate nan", "--learning_rate nan: must be a finite number"),
        ("--predictor_learning_rate inf", "--predictor_learning_rate inf: must be a finite number"),
        ("--keep_loss_weight nan", "--keep_loss_weight nan: must be a finite number"),
        ("--weight_decay nan", "--weight_decay nan"),
        ("--warmup_steps nan", "--warmup_steps nan"),
        ("--num_train_epochs inf", "--num_train_epochs inf"),
        ("--lora_alpha nan", "--lora_alpha nan"),
        ("--learning_rate inf", "--learning_rate inf"),
        ("--predictor_learning_rate nan", "--predictor_learning_rate nan"),
        ("--keep_loss_weight inf", "--keep_loss_weight inf"),
        ("--keep_loss_weight -1", "keep_loss_weight"),
        ("--weight_decay inf", "--weight_decay inf"),
        ("--weight_decay -1", "--weight_decay -1"),
        ("--max_grad_norm nan", "--max_grad_norm nan"),
        ("--max_grad_norm inf", "--max_grad_norm inf"),
        ("--max_grad_norm -1", "--max_grad_norm -1"),
        ("--skip_bad -1", "--skip_bad -1"),
        ("--skip_bad 1.5", "--skip_bad 1.5"),
        ("--skip_bad nan", "--skip_bad nan"),
        ("--loss_average mean", "--loss_average mean"),
        ("--train_projector true --lora_rank 4", "--train_projector"),
        ("--train_projector true --train predictors", "--train_projector"),
        ("--train projector", "--train projector"),
        ("--held_out 1 --lora_rank 4 --fsdp full_shard", "--held_out under FSDP"),
        ("--model_max_length 0", "--model_max_length"),
        ("--report_to nonsense", "--report_to nonsense: not installed here"),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers -1"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--data_path nowhere.json", "nowhere.json"),
        ("--image_folder nowhere", "nowhere"),
    ],
)
def test_flags(data, tmp_path, capsys, flags, named):
    assert named in refuse(capsys, *command(data, tmp_path, *flags.split()))
    assert not (tmp_path / "out").exists()


def test_missing_flags(capsys):
    assert "--data_path" in refuse(capsys)


def changed(**changes):
    return [GOOD, {**GOOD, "id": "bad", **changes}]


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        ("{", "not a JSON file"),
        ({"a": 1}, "JSON list"),
        ([GOOD, "hello"], "sample 1"),
        ([GOOD, {"id": "bad", "image": "0.png"}], "bad"),
        ([{"id": "text", "conversations": conversation(("what", "a"))}], "none of its 1 samples"),
        ([{"id": "bad", "conversations": conversation(("<image>\nwhat", "a"))}], "bad"),
        (changed(image=3), "bad"),
        (changed(image=["0.png", "1.png"]), "1 <image> markers in its questions but 2 images"),
        (changed(conversations=conversation(("what", "a"))), "0 <image> markers"),
        (changed(conversations=conversation(("<image><image>what", "a"))), "2 <image> markers"),
        (changed(conversations=conversation(("<image>\n", "a"))), "empty question"),
        (
            changed(conversations=conversation(("<image>\nwhat", "a"), ("which", " "))),
            "turn 1 has an empty answer",
        ),
        (changed(conversations=conversation(("what", "<image>"))), "bad"),
        (changed(conversations=GOOD["conversations"][:1]), "alternate"),
        (changed(conversations=GOOD["conversations"][::-1]), "alternate"),
        (changed(conversations=[]), "alternate"),
        (changed(conversations=[{"from": "user", "value": "<image>what"}]), "'user'"),
        (changed(conversations=[{"role": "user", "content": "<image>what"}]), "message 0"),
        (changed(image="no/such.png"), "no/such.png"),
        (changed(conversations=conversation(("<image>\nwhat", "half \ud83d"))), "half of a character"),
    ],
)
def test_mixtures(data, tmp_path, capsys, mixture, named):
    path = tmp_path / "mix.json"
    path.write_text(mixture if isinstance(mixture, str) else json.dumps(mixture))
    line = refuse(capsys, *command(data, tmp_path, "--data_path", str(path)))
    assert named in line and ("mix.json" in line or "--image_folder" in line)


def test_missing_images_are_counted_by_folder(data, tmp_path, capsys):
    rows = [{**GOOD, "id": f"r{i}", "image": f"sub/{i}.png"} for i in range(4)] + [
        {**GOOD, "image": "9.png"},
        GOOD,
    ]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(rows))
    line = refuse(capsys, *command(data, tmp_path, "--data_path", str(path)))
    assert "5 of 6 samples can't be trained on, --skip_bad 0.001 allows 0: 4 x " in line
    assert "(id 'r0'): image sub/0.png is missing (4 of 4 in sub); " in line
    assert "image 9.png is missing (1 of 2 in .)" in line


def test_an_image_folder_that_cannot_be_listed(data, tmp_path, capsys, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("train.images.os.scandir", refused)
    assert "can't be listed (Permission denied)" in refuse(capsys, *command(data, tmp_path))


@pytest.mark.parametrize("adapter", [(), ("--lora_rank", "4")])
def test_the_folder_that_a_run_starts_from(data, tmp_path, capsys, adapter):
    base = save_checkpoint(tmp_path / "base")
    capsys.readouterr()
    shutil.copytree(base, tmp_path / "lora", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    out = ["--output_dir", str(tmp_path / "lora" / ".." / "base"), "--overwrite_output_dir", "true", *adapter]
    for start in (base, tmp_path / "lora"):
        line = refuse(capsys, *command(data, tmp_path, "--model_name_or_path", str(start), *out))
        assert "that the run starts from" in line


def test_layer_outside_the_model(data, tmp_path, capsys):
    assert "sparse_layer" in refuse(capsys, *command(data, tmp_path, "--sparse_layer", "99"))


def test_checkpoint_that_is_not_there(data, tmp_path, capsys):
    flags = command(data, tmp_path, "--model_name_or_path", str(tmp_path / "nowhere"))
    assert "nowhere" in refuse(capsys, *flags)


@pytest.mark.parametrize("sparsity", [{"policy": "fastvv"}, {"sparse_layer": 400}, {"keep_loss_weight": -1}])
def test_settings_of_the_checkpoint_itself_that_no_model_has(data, tmp_path, capsys, sparsity):
    """The run's flags take their place, and would hide them until the model is used."""
    start = save_checkpoint(tmp_path / "start")
    capsys.readouterr()
    config = json.loads((start / "config.json").read_text())
    config["text_config"]["sparsity"].update(sparsity)
    (start / "config.json").write_text(json.dumps(config))
    assert next(iter(sparsity)) in refuse(
        capsys, *command(data, tmp_path, "--model_name_or_path", str(start))
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_nothing_is_written_before_model_and_places_are_looked_at(data, tmp_path, capsys):
    """The data's cache was, though it takes minutes, and so was the output folder."""
    (tmp_path / "file").touch()
    for flags, named in (
        ("--model_name_or_path nowhere/at/all", "nowhere/at/all"),
        ("--sparse_layer 99", "sparse_layer"),
        ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere: not a whole checkpoint"),
        (f"--output_dir {tmp_path / 'file'}", "--output_dir"),
        (f"--output_dir {tmp_path / 'file' / 'below'}", "--output_dir"),
        ("--image_folder nowhere", "--image_folder nowhere: no such folder"),
    ):
        assert named in refuse(capsys, *command(data, tmp_path, *flags.split()))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], flags


def test_paths_out_of_the_image_folder_are_refused_before_anything_is_read(data, tmp_path, capsys):
    images = tmp_path / "root" / "images"
    images.mkdir(parents=True)
    shutil.copy(data[1] / "0.png", images.parent / "secret.png")
    shutil.copy(data[1] / "0.png", images / "0.png")
    (images / "link.png").symlink_to(images.parent / "secret.png")
    (images / "folder").symlink_to(images.parent)
    (images / "inside.png").symlink_to("0.png")
    path = tmp_path / "mix.json"
    outside = ["../secret.png", str(images.parent / "secret.png"), "link.png", "folder/secret.png"]
    flags = [
        "--data_path",
        str(path),
        "--image_folder",
        str(images),
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
    ]
    flags += [
        "--global_batch_size",
        "1",
        "--per_device_train_batch_size",
        "1",
        "--dataloader_num_workers",
        "0",
    ]
    for image in outside:
        path.write_text(json.dumps([{**GOOD, "image": "inside.png"}, {**GOOD, "id": "odd", "image": image}]))
        line = refuse(capsys, *command(data, tmp_path, *flags, "--skip_bad", "1"))
        assert f"{image} of" in line and "(id 'odd') lies outside of it" in line and "--allow_outside" in line
    path.write_text(json.dumps([{**GOOD, "image": image} for image in ["inside.png", *outside]]))
    flags += ["--allow_outside", "true", "--report_to", "none"]
    assert main(command(data, tmp_path, *flags)) == 0


def test_folder_that_holds_a_model(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "--overwrite_output_dir" in refuse(capsys, *command(data, tmp_path))


def test_flags_from_a_file(data, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("vision_keep_rate: 7\ntext_keep_rate: 0.4\nuse_cpu: true\n")
    assert "vision_keep_rate: 7.0" in refuse(capsys, *command(data, tmp_path, "--config", str(path)))
    line = refuse(capsys, *command(data, tmp_path, "--config", str(path), "--vision_keep_rate", "8"))
    assert "vision_keep_rate: 8.0" in line
    path.write_text("nonsense: 1\n")
    assert "--nonsense" in refuse(capsys, *command(data, tmp_path, "--config", str(path)))


def test_error_from_a_data_loading_process_is_one_line():
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    line = one_line(ValueError(text + "dynllava_plugin.errors.UserError: x.png: Error: bad\n"))
    assert line == "x.png: Error: bad"
