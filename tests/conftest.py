"""Shared fixtures: a small easy-VQA, the bundled model, and no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import ImageFile

from tests.property_tests import use_profile

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def gradients_on() -> None:
    """Importing a harness may switch gradients off, and checks of images, for the whole process."""
    torch.set_grad_enabled(True)
    ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.fixture(scope="session")
def easy_vqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted test sets, with few scenes."""
    from dynllava_plugin.easy_vqa.writing import write_test

    folder = tmp_path_factory.mktemp("easy_vqa")
    write_test(folder, scenes=20, questions=4, described=10, seed=0)
    return folder


@pytest.fixture
def easy_vqa_data(easy_vqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`easy_vqa_folder`, where the tasks find it."""
    monkeypatch.setenv("DYNLLAVA_EASY_VQA", str(easy_vqa_folder))
    return easy_vqa_folder


use_profile()
