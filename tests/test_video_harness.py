"""Videos asked about through lmms-eval, and the frames that VLMEvalKit makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from lmms_eval.api.instance import Instance
from vlmeval.inference_video import infer_data_job_video

from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.lmms_eval.model import DynamicLlava
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.suite.worker import OneModel
from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava as KitModel
from dynllava_plugin.videos import open_video
from tests.families.checkpoints import picture, write_checkpoint

FAMILIES = (
    "internvl",
    "llava_next_video",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
)  # those whose processors read videos
ASKED = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {name: str(write_checkpoint(name, folder / name)) for name in (*FAMILIES, "llava_next")}


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (56, 84), seed: int = 0) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 4.0, size)
    for frame in range(frames):
        writer.write(np.asarray(picture(size, seed + frame))[..., ::-1])
    writer.release()
    return path


def ask(model: DynamicLlava, visuals: list[list[Any]]) -> list[str]:
    model.task_dict["videos"] = {"test": list(range(len(visuals)))}
    requests = [
        Instance(
            request_type="generate_until", idx=0, metadata={"task": "videos", "doc_id": row, "repeats": 1},
            arguments=("What color is the shape?", dict(ASKED), lambda doc: visuals[doc], row, "videos", "test"),
        )
        for row in range(len(visuals))
    ]  # fmt: skip
    return [answer.text for answer in model.generate_until(requests)]


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_and_images_share_a_batch_and_are_what_the_processor_makes_of_them(
    family: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    model = DynamicLlava(
        "4", pretrained=checkpoints[family], device="cpu", dtype="float32", policy="image_text,keep=0.4", video_frames=4
    )  # fmt: skip
    paths = [str(write_video(tmp_path / f"{seed}.mp4", seed=10 * seed)) for seed in range(2)]
    visuals = [[paths[0]], [picture((56, 56), 3)], [picture((28, 56), 4), paths[1]], [paths[1]]]
    together = ask(model, visuals)
    assert together == [answer for one in visuals for answer in ask(model, [one])]
    assert len({*together}) == len(together)
    counts = model.record.to_dict("lmms-eval")["tokens"]["videos"]
    assert 0.25 < counts["kept_image_tokens"] / counts["image_tokens"] <= 0.4
    # As a user of the processor and of `generate` has it.
    engine = model.engine
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What color is the shape?"}]}
    ]
    prompt = engine.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(frames, metadata = .*?)```", readme, re.DOTALL)
    assert code
    typed = code[1].replace("clip.mp4", paths[0]).replace("frames=16", "frames=4")
    names: dict[str, Any] = {"open_video": open_video, "processor": engine.processor, "prompt": prompt}
    exec(typed, names)
    assert names["frames"].shape == (4, 84, 56, 3)
    assert names["metadata"].frames_indices.tolist() == [0, 4, 7, 11]
    with torch.no_grad():
        out = engine.model.generate(**names["inputs"], **ASKED, do_sample=False)
    assert engine.processor.decode(out[0, -6:], skip_special_tokens=True).strip() == together[0]


def test_ones_own_questions_may_be_about_videos(checkpoints: dict[str, str], tmp_path: Path) -> None:
    path, name = write_video(tmp_path / "clip.mp4"), checkpoints["qwen3_vl"]
    row = {"question_id": 1, "image": path.name, "text": "What color is the shape?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    flags = [
        "--image-folder",
        str(tmp_path),
        "--pretrained",
        name,
        "--output",
        str(tmp_path / "answers.jsonl"),
    ]
    flags += ["--device", "cpu", "--mode", "full", "--video-frames", "4", "--max-new-tokens", "6"]
    assert main(["answer", str(tmp_path / "questions.jsonl"), *flags]) == 0
    answer = json.loads((tmp_path / "answers.jsonl").read_text())["text"]
    model = DynamicLlava("1", pretrained=name, device="cpu", mode="full", video_frames=4)
    assert ask(model, [[str(path)]]) == [answer]


def test_what_is_no_video_is_one_line(checkpoints: dict[str, str], tmp_path: Path) -> None:
    model = DynamicLlava("2", pretrained=checkpoints["qwen2_5_vl"], device="cpu", mode="full")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for path, problem in ((broken, "can't be decoded"), (tmp_path / "none.mp4", "doesn't exist")):
        with pytest.raises(UserError, match=rf"^videos test 0: video \S*{path.name} {problem}[^\n]*$"):
            ask(model, [[str(path)]])
    images_only = DynamicLlava("2", pretrained=checkpoints["llava_next"], device="cpu", mode="full")
    with pytest.raises(
        UserError, match=r"^videos test 0: \S*broken.mp4 is a video, and the checkpoint reads images only$"
    ):
        ask(images_only, [[str(broken)]])
    with pytest.raises(UserError, match="video_frames: 0; a video needs one"):
        Engine.load(ModelSettings(checkpoints["qwen2_5_vl"], device="cpu", video_frames=0))
    load, settings = OneModel(), ModelSettings(checkpoints["qwen2_5_vl"], device="cpu", video_frames=4)
    # A suite's next command, over the same checkpoint in memory, looks at as many.
    assert [load(settings, 2).encoder.frames for _ in range(2)] == [4, 4]
    with pytest.raises(UserError, match="video_frames: 4; this checkpoint reads no videos"):
        Engine.load(ModelSettings("tiny", device="cpu", video_frames=4))


def test_the_kit_writes_answers_about_a_videos_frames_as_text(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """The kit's own loop over a video dataset: it writes what `str` makes of an answer."""
    frames = [picture((56, 56), seed) for seed in range(2)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")

    def build_prompt(row: int, video_llm: bool) -> list[dict[str, str]]:
        assert not video_llm
        images = [{"type": "image", "value": str(tmp_path / f"{number}.png")} for number in range(2)]
        return [*images, {"type": "text", "value": f"Question {row}?"}]

    data = pd.DataFrame({"index": [0, 1], "question": ["a", "b"]})
    dataset = SimpleNamespace(dataset_name="Frames", data=data, nframe=2, fps=-1, build_prompt=build_prompt)
    model = KitModel(2, pretrained=checkpoints["qwen2_5_vl"], device="cpu", mode="full", max_new_tokens=4)
    infer_data_job_video(model, str(tmp_path), "dynllava", dataset, str(tmp_path / "out.xlsx"))
    found = pd.read_excel(tmp_path / "out.xlsx")["prediction"].tolist()
    expected = [model.generate(build_prompt(row, False), dataset="Frames")["prediction"] for row in range(2)]
    assert found == expected and all(found)
