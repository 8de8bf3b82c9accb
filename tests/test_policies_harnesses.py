"""Every policy of `CASES` through both harness adapters, selected by the text that a user types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.lmms_eval.model import DynamicLlava
from dynllava_plugin.evaluation.results.manifest import mode_name
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.vlmevalkit.command import main
from dynllava_plugin.evaluation.vlmevalkit.model import DynamicLlava as KitModel
from dynllava_plugin.policies.registry import parse_policy, policy_changes
from tests.policy_cases import Case, cases

QUESTIONS = ("what color is the shape?", "is there a circle?")


@pytest.fixture(scope="module")
def lm() -> DynamicLlava:
    return DynamicLlava(
        batch_size="2", **simple_parse_args_string("pretrained=tiny,device=cpu,policy=random,r=0.5")
    )


@pytest.fixture(scope="module")
def kit(lm: DynamicLlava) -> KitModel:
    model = KitModel(batch_size=2, max_new_tokens=4, pretrained="tiny", device="cpu", policy="random,r=0.5")
    assert model.engine.model._llm.policy == lm.engine.model._llm.policy
    model.engine.model.load_state_dict(lm.engine.model.state_dict())  # the same fresh predictors
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for color in ("red", "blue"):
        image = Image.new("RGB", (128, 128), "white")
        image.paste(color, (10, 40, 70, 90))
        paths.append(str(folder / f"{color}.png"))
        image.save(paths[-1])
    return paths


@pytest.mark.parametrize(**cases())
def test_both_adapters_answer_alike(case: Case, lm: DynamicLlava, kit: KitModel, pictures: list[str]) -> None:
    settings = ModelSettings.from_dict(simple_parse_args_string(f"pretrained=tiny,policy={case.text}"))
    assert parse_policy(settings.policy or "") == parse_policy(case.text)
    for engine in (lm.engine, kit.engine):
        engine.model.set_sparsity(**policy_changes(settings.sparsity()))
    lm.task_dict = {"task": {"test": pictures}}
    requests = []
    for index, question in enumerate(QUESTIONS):
        arguments: tuple[Any, ...] = (
            question,
            {"max_new_tokens": 4},
            lambda doc: [Image.open(doc)],
            index,
            "task",
            "test",
        )
        metadata = {"task": "task", "doc_id": index, "repeats": 1}
        requests.append(
            Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)
        )
    answers = [result.text for result in lm.generate_until(requests)]
    scores = lm.loglikelihood(
        [Instance(request_type="loglikelihood", arguments=(q, "red", lambda doc: [Image.open(doc)], i, "task", "test"), idx=0,
                  metadata={"task": "task", "doc_id": i, "repeats": 1}) for i, q in enumerate(QUESTIONS)]
    )  # fmt: skip
    assert all(loss > 0 for loss, _ in scores)
    for index, (question, picture) in enumerate(zip(QUESTIONS, pictures, strict=True)):
        message = [{"type": "image", "value": picture}, {"type": "text", "value": question}]
        found = kit.generate_inner(message, "task")
        assert found["prediction"] == answers[index]
        counts = found["extra_records"]
        policy = kit.engine.model._llm.policy
        if policy.image and policy.image.fixed:
            assert counts["kept_image_tokens"] == policy.kept_tokens(counts["image_tokens"])


def test_flags_of_both_harnesses_are_checked_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for flags, problem in (
        (["--policy", "fast"], "policy: unknown value 'fast'"),
        (["--policy", "fastv,r=1"], "fastv: r=1 is outside [0, 1)"),
        (["--policy", "fastv", "--mode", "image"], "mode: policy=fastv says what is dropped"),
    ):
        assert main(["--model", "dynllava", "--data", "EasyVQA", *flags]) == 2
        assert capsys.readouterr().err.startswith(f"error: {problem}")
    with pytest.raises(UserError, match="fastv: no argument 'colour'"):
        DynamicLlava(pretrained="tiny", policy="fastv", colour="red")


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [
        (
            {"policy": "fastv", "policy_args": {"k": 3, "r": 0.75}, "vision_keep_rate": 0.1},
            "fastv,k=3,r=0.75",
        ),
        ({"policy": "fastv", "vision_keep_rate": 0.1}, "fastv@10%"),
        ({"policy": "fastv", "policy_args": {"k": 2}, "vision_keep_rate": 0.4}, "fastv,k=2@40%"),
        ({"policy": "structure", "vision_keep_rate": 0.1}, "structure"),
        ({"policy": "random,r=0.5"}, "random,r=0.5"),
    ],
)
def test_names_in_tables(sparsity: dict, name: str) -> None:
    assert mode_name({"mode": "image_text", **sparsity}) == name
