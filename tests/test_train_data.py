"""Reading, ordering, cutting and batching the data."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import JsonList, Sample, read_sample
from dynllava_plugin.model.prompts import with_images
from tests.property_tests import examples
from tests.training_kit import IMAGE_TOKENS, conversation, processor, save_checkpoint, save_mixture
from train import mixture as mixtures
from train.conversation import IGNORE, ConversationEncoder, Tokens
from train.data import Collator, ConversationDataset
from train.finetune import main
from train.mixture import Mixture, open_mixture
from train.sampling import EpochSampler
from train.skipped import SkippedSamples, UnusableSample

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("json") / "list.json"


@examples(150)
@given(values=st.lists(JSON, max_size=5), chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_a_list_is_read_piece_by_piece(file, values, chunk, indent):
    for plain in (True, False):
        file.write_text(json.dumps(values, ensure_ascii=plain, indent=indent), encoding="utf-8")
        assert list(JsonList(file, chunk=chunk)) == values


@examples(100)
@given(values=st.lists(JSON, min_size=1, max_size=4), chunk=st.integers(1, 40), data=st.data())
def test_a_list_cut_short_is_an_error(file, values, chunk, data):
    text = json.dumps(values)
    file.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(UserError, match=r"not a JSON file|something else"):
        list(JsonList(file, chunk=chunk))


def test_damage_is_named_by_its_character(file):
    file.write_text('[{"a": 1}, {"b": tru}]')
    with pytest.raises(UserError, match="character 17"):
        list(JsonList(file, chunk=4))
    file.write_text("[1, 2] 3")
    with pytest.raises(UserError, match="something follows"):
        list(JsonList(file))


@pytest.fixture
def data(tmp_path) -> tuple[Path, Path]:
    return save_mixture(tmp_path / "data", samples=7)


def test_the_cache_holds_the_samples_and_is_parsed_once(data, tmp_path, monkeypatch):
    path, _ = data
    rows = json.loads(path.read_text())
    mixture, left_out = open_mixture(path, tmp_path / "cache")
    assert (len(mixture), left_out) == (7, 1)
    for index, sample in enumerate(mixture):
        plain = read_sample(f"{path}: sample {index} (id 's{index}')", rows[index])
        assert sample == plain and mixture.name(index) == plain.name
    assert mixture.images() == [f"{index}.png" for index in range(7)]
    again: Mixture = pickle.loads(pickle.dumps(mixture.take(np.array([4, 2]))))
    assert [again[0], again[1]] == [mixture[4], mixture[2]]

    def parsed(*args):
        raise AssertionError("parsed again")

    with monkeypatch.context() as patch:
        patch.setattr(mixtures, "JsonList", parsed)
        assert open_mixture(path, tmp_path / "cache")[0][3] == mixture[3]
        path.write_text(json.dumps(rows[:3]))
        with pytest.raises(AssertionError, match="parsed again"):
            open_mixture(path, tmp_path / "cache")
    shorter, _ = open_mixture(path, tmp_path / "cache")
    assert len(shorter) == 3 and shorter.digest != mixture.digest
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".arrow"]


def test_conversations_without_images_are_left_out_taken_or_refused(data, tmp_path):
    path, _ = data
    everything, left_out = open_mixture(path, tmp_path / "cache", text_only=True)
    assert (len(everything), left_out) == (8, 0) and everything[7].images == ()
    assert everything.image_counts().tolist() == [1] * 7 + [0]
    rows = json.loads(path.read_text())
    rows.append({"id": "odd", "conversations": conversation(("what", "a"))[:1]})
    path.write_text(json.dumps(rows))
    with_images, _ = open_mixture(path, tmp_path / "cache")
    assert len(with_images) == 7 and not with_images.problems()  # nobody trains on it
    ((row, problem),) = open_mixture(path, tmp_path / "cache", text_only=True)[0].problems().items()
    assert row == 8 and "sample 8 (id 'odd')" in problem and "alternate" in problem


def test_a_cache_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="--data_cache"):
        open_mixture(data[0], tmp_path / "cache")
    broken = tmp_path / "broken.json"
    broken.write_text("[{]")
    with pytest.raises(UserError):
        open_mixture(broken, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_processes_of_one_number_on_two_nodes_write_the_cache_side_by_side(data, tmp_path, monkeypatch):
    write = mixtures._write

    def slowly(path, target):
        write(path, target)
        with monkeypatch.context() as patch:
            patch.setattr(mixtures, "_write", write)
            open_mixture(path, tmp_path / "cache")  # the other one, through first

    monkeypatch.setattr(mixtures, "_write", slowly)
    assert len(open_mixture(data[0], tmp_path / "cache")[0]) == 7


MEASURE = """
import json, resource, sys, types
from pathlib import Path
for name in ("dynllava_plugin", "dynllava_plugin.model"):  # without torch, which takes longer than the file
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
from train.mixture import open_mixture
held = []
for name in sys.argv[1:]:
    mixture, _ = open_mixture(name, Path(name).parent / "cache")
    held.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps([len(mixture), *held]))
"""


def test_reading_a_file_costs_less_than_twice_its_size_in_memory(tmp_path):
    answer = "There is a red circle on the left, a blue square – and no green shape. " * 12
    turns = conversation(("<image>\nwhat is there", answer), ("is there a circle", "yes"))
    row = json.dumps({"id": "0123456789", "image": "coco/train2017/0.jpg", "conversations": turns})
    files = {name: tmp_path / f"{name}.json" for name in ("tiny", "big")}
    for name, path in files.items():
        path.write_text("[" + ", ".join([row] * (30_000_000 // len(row) if name == "big" else 1)) + "]")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", MEASURE, *map(str, files.values())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    samples, before, after = json.loads(done.stdout)
    assert samples > 20_000
    assert after - before < 2 * files["big"].stat().st_size


def test_lengths_are_about_those_of_the_tokens(data, tmp_path):
    path, images = data
    ready = processor()
    dataset = dataset_of(open_mixture(path, tmp_path / "cache")[0], images, tmp_path, ready)
    exact = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    assert np.corrcoef(exact, dataset.lengths())[0, 1] > 0.9


def dataset_of(mixture, images, folder, ready, max_length=2048, strict=False) -> ConversationDataset:
    skipped = SkippedSamples(folder / "skipped.jsonl")
    encode = ConversationEncoder(ready, ready.image_token_id, IMAGE_TOKENS)
    return ConversationDataset(mixture, images, encode, max_length, strict, skipped)


@examples(60)
@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 16),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_an_epoch_is_every_sample_in_whole_batches(samples, batch, seed, epoch, grouped):
    lengths = np.random.default_rng(0).integers(1, 1000, samples) if grouped else None
    sampler = EpochSampler(samples, batch, seed, lengths)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % batch == 0 and len(order) - samples < batch
    assert set(order) == set(range(samples))
    drawn = EpochSampler(samples, batch, seed)
    drawn.set_epoch(epoch)
    at_random = np.array(list(drawn))
    assert sorted(at_random[:samples]) == list(range(samples))  # the fill comes last
    if lengths is not None:  # what is in a global batch stays drawn at random
        rows = np.array(order).reshape(-1, batch)
        assert (np.sort(rows, 1) == np.sort(at_random.reshape(-1, batch), 1)).all()
        assert (np.diff(lengths[rows], axis=1) <= 0).all()
    again = EpochSampler(samples, batch, seed, lengths)
    again.set_epoch(epoch)
    assert list(again) == order


def test_orders_differ_by_epoch_and_seed():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochSampler(100, 10, seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 3


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)

    def padding(sampler: EpochSampler) -> float:
        batches = lengths[np.array(list(sampler))].reshape(-1, 8)
        return 1 - batches.mean() / batches.max(1).mean()

    assert padding(EpochSampler(4000, 64, 0, lengths)) < 0.1 < padding(EpochSampler(4000, 64, 0))


READY = processor()
TEXT = st.text(st.sampled_from("abc redblue"), min_size=1, max_size=40).filter(str.strip)


@examples(80)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 2)), min_size=1, max_size=4),
    max_length=st.integers(1, 260),
)
def test_truncation_never_cuts_an_image(tmp_path_factory, turns, max_length):
    folder = tmp_path_factory.getbasetemp()
    images = tuple("x.png" for _, _, count in turns for _ in range(count))
    sample = Sample("s", images, tuple((with_images(q, count), a) for q, a, count in turns))
    dataset = dataset_of([sample], folder, folder, READY, max_length)
    whole = dataset.encode(sample)
    try:
        cut: Tokens = dataset.truncate(sample, whole)
    except UnusableSample as error:
        assert len(whole.input_ids) > max_length and "s has" in str(error)
        lost = READY.image_token_id in whole.input_ids[max_length:]
        assert lost or all(label == IGNORE for label in whole.labels[:max_length])
        return
    assert len(cut.input_ids) == len(cut.labels) == min(len(whole.input_ids), max_length)
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert cut.input_ids.count(READY.image_token_id) == len(images) * IMAGE_TOKENS
    assert any(label != IGNORE for label in cut.labels)


def test_a_batch_without_images_gets_one_that_changes_nothing(tmp_path):
    blank = ConversationEncoder(READY, READY.image_token_id, IMAGE_TOKENS).stand_in()
    collate = Collator(READY.tokenizer.pad_token_id, blank)
    row = {"input_ids": [1, 5, 6], "labels": [IGNORE, 5, 6], "images": None, "sample": 0}
    batch = collate([row, row])
    assert torch.equal(batch.pop("pixel_values"), blank["pixel_values"])
    from dynllava_plugin import load_model

    model, _ = load_model(save_checkpoint(tmp_path / "checkpoint"), device="cpu")
    model.train()
    batch.pop("sample")
    alone = model(**batch)
    with_blank = model(**batch, **blank)
    assert torch.equal(alone.logits, with_blank.logits) and torch.equal(alone.lm_loss, with_blank.lm_loss)
    assert with_blank.image_keep_loss == 0
    with_blank.loss.backward()
    for name, parameter in model.named_parameters():
        if "predictor" in name and "text" not in name:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_text_only_samples_train_in_any_portion(tmp_path):
    """Several images, one or none in a sample; a micro-batch without any image weighs what it should."""
    mixture, images = save_mixture(tmp_path / "data", samples=2)
    rows = json.loads(mixture.read_text())
    two = conversation(("<image>\n<image>\nwhat color is the shape", "red"), ("is there a circle", "no"))
    rows.append({"id": "two", "image": ["0.png", "1.png"], "conversations": two})
    mixture.write_text(json.dumps(rows))
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    weights = []
    for portion in ("4", "1"):
        out = tmp_path / portion
        flags = f"--model_name_or_path {checkpoint} --data_path {mixture} --image_folder {images} --use_cpu "
        flags += (
            f"--output_dir {out} --per_device_train_batch_size {portion} --global_batch_size 4 --max_steps 2 "
        )
        flags += f"--data_cache {tmp_path / 'cache'} --text_only true --optim sgd --learning_rate 0.1 "
        flags += "--predictor_learning_rate 0.01 --warmup_steps 0 --max_grad_norm 0 --report_to none "
        flags += "--dataloader_num_workers 0 --save_strategy no --train_sampling_strategy group_by_length"
        assert main(flags.split()) == 0
        weights.append(load_file(out / "model.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)
