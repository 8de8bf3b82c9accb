"""What each cell of the smoke table has to be, from the saved predictions and the miniatures' own truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
from tests.smoke import readings

Truth = Sequence[Mapping[str, Any]]
Predictions = Mapping[int, str]
Expectation = Callable[[Predictions, Truth], float | tuple[float, float]]


def _percent(hits: Sequence[float]) -> float:
    return 100 * sum(hits) / len(hits)


def _soft(said: Predictions, truth: Truth) -> float:
    return _percent([readings.soft_score(said[row["number"]], row["answers"]) for row in truth])


def _exact(said: Predictions, truth: Truth) -> float:
    return _percent([said[row["number"]].strip().lower() == row["answer"] for row in truth])


def _nearest(said: Predictions, truth: Truth) -> float:
    return _percent([readings.edit_score(said[row["number"]], row["answer"]) for row in truth])


def _contained(said: Predictions, truth: Truth) -> float:
    """OCRBench: right answers of 1,000, in percent, however many were asked."""
    return sum(row["answer"] in said[row["number"]].lower() for row in truth) / 10


def _choice(read: Callable[[str], str]) -> Expectation:
    return lambda said, truth: _percent([read(said[row["number"]]) == row["letter"] for row in truth])


def _choice_of(read: Callable[[str, Mapping[str, str]], str]) -> Expectation:
    return lambda said, truth: _percent(
        [read(said[row["number"]], options(row["choices"])) == row["letter"] for row in truth]
    )


def options(choices: Sequence[str]) -> dict[str, str]:
    """Letter -> choice."""
    return {chr(ord("A") + place): choice for place, choice in enumerate(choices)}


def _f1_kit(said: Predictions, truth: Truth) -> float:
    pairs = [(readings.yes_no_kit(said[row["number"]]), row["answer"]) for row in truth]
    both = sum(found == wanted == "yes" for found, wanted in pairs)
    either = sum(found == "yes" for found, _ in pairs) + sum(wanted == "yes" for _, wanted in pairs)
    return 200 * both / either if both else 0.0


def _f1_lmms_eval(said: Predictions, truth: Truth) -> float:
    """An answer that is neither yes nor no isn't counted as a miss."""
    pairs = [(said[row["number"]].strip().lower(), row["answer"]) for row in truth]
    both = pairs.count(("yes", "yes"))
    wrong = pairs.count(("yes", "no")) + pairs.count(("no", "yes"))
    return 200 * both / (2 * both + wrong) if both else 0.0


def _mme(read: Callable[[str], str]) -> Expectation:
    """The sum over the perception categories of accuracy and of images with both answers right, in percent."""

    def score(said: Predictions, truth: Truth) -> float:
        images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for row in truth:
            if row["category"] != "commonsense_reasoning":
                hit = read(said[row["number"]]) == row["answer"]
                images[row["category"]][row["image_id"]].append(hit)
        total = 0.0
        for category in images.values():
            hits = list(category.values())
            total += _percent([value for pair in hits for value in pair]) + _percent(
                [all(pair) for pair in hits]
            )
        return total

    return score


def _pairs(read: Callable[[str, Mapping[str, str]], str]) -> Expectation:
    def score(said: Predictions, truth: Truth) -> float:
        hits = [read(said[row["number"]], options(row["choices"])) == row["letter"] for row in truth]
        return _percent([first and second for first, second in zip(hits[::2], hits[1::2], strict=True)])

    return score


def _circular(said: Predictions, truth: Truth) -> float:
    """MMBench in VLMEvalKit: every turn of the options has to be answered right; rows are numbered turn by turn."""
    hits, number = [], 0
    for row in truth:
        choices, right = list(row["choices"]), True
        for turn in range(len(choices)):
            turned = options(choices[turn:] + choices[:turn])
            found = readings.letter_kit(said[number], turned)
            right &= bool(found) and turned[found] == row["answer"]
            number += 1
        hits.append(right)
    return _percent(hits)


def _four(row: Mapping[str, Any]) -> dict[str, str]:
    filling = [name for name in ("none of these", "several", "unclear") if name not in row["choices"]]
    return options([*row["choices"], *filling][:4])


def _seed_kit(said: Predictions, truth: Truth) -> float:
    return _percent([readings.letter_kit(said[row["number"]], _four(row)) == row["letter"] for row in truth])


def _realworldqa(said: Predictions, truth: Truth) -> float:
    hits = []
    for row in truth:
        text = said[row["number"]]
        if row["number"] % 2 == 0:
            hits.append(readings.letter_capital(text) == row["letter"])
        else:
            hits.append(text.lower().strip().rstrip(".") == row["answer"])
    return _percent(hits)


def _mean_over(
    group: str, read: Callable[[str, Mapping[str, str]], str], right: str = "letter"
) -> Expectation:
    """The mean over the groups of questions of each one's percentage."""

    def score(said: Predictions, truth: Truth) -> float:
        groups: dict[str, list[bool]] = defaultdict(list)
        for row in truth:
            groups[row[group]].append(read(said[row["number"]], options(row["choices"])) == row[right])
        return sum(_percent(hits) for hits in groups.values()) / len(groups)

    return score


def _mmmu_lmms_eval(said: Predictions, truth: Truth) -> tuple[float, float]:
    """Bounds: where an answer names no option, lmms-eval draws one."""
    right, drawn = 0, 0
    for row in truth:
        text = said[row["number"]]
        if row["number"] % 4 == 3:  # an open question
            right += row["answer"] in text.lower()
        else:
            letter = readings.letter_capital(text)
            right += letter == row["letter"]
            drawn += letter not in options(row["choices"])
    low, high = (100 * count / len(truth) for count in (right, right + drawn))
    return low - 1e-3, high + 1e-3  # it rounds


def _mmmu_kit(said: Predictions, truth: Truth) -> float:
    """An open question has its answer as one option and "Other Answers" as the other."""
    hits = []
    for row in truth:
        is_open = row["number"] % 4 == 3
        choices = [row["answer"], "Other Answers"] if is_open else row["choices"]
        found = readings.letter_kit(said[row["number"]], options(choices))
        hits.append(found == ("A" if is_open else row["letter"]))
    return _percent(hits)


def _whole(read: Callable[[str], str]) -> Callable[[str, Mapping[str, str]], str]:
    return lambda text, choices: read(text)


EXPECTED: dict[tuple[str, str], Expectation] = {
    ("VQAv2", LMMS_EVAL): _soft,
    ("VQAv2", VLMEVALKIT): _soft,
    ("VizWiz", LMMS_EVAL): _soft,
    ("VizWiz", VLMEVALKIT): _soft,
    ("TextVQA", LMMS_EVAL): _soft,
    ("TextVQA", VLMEVALKIT): _soft,
    ("GQA", LMMS_EVAL): _exact,
    ("GQA", VLMEVALKIT): _exact,
    ("SciQA", LMMS_EVAL): _choice(readings.letter_strict),
    ("SciQA", VLMEVALKIT): _choice_of(readings.letter_kit),
    ("POPE", LMMS_EVAL): _f1_lmms_eval,
    ("POPE", VLMEVALKIT): _f1_kit,
    ("MME", LMMS_EVAL): _mme(readings.yes_no_mme),
    ("MME", VLMEVALKIT): _mme(readings.yes_no_kit),
    ("MMBench", LMMS_EVAL): _choice_of(readings.letter_mmbench),
    ("MMBench", VLMEVALKIT): _circular,
    ("SEED", LMMS_EVAL): _choice(readings.letter_first),
    ("SEED", VLMEVALKIT): _seed_kit,
    ("MMVP", LMMS_EVAL): _pairs(_whole(readings.letter_mmvp)),
    ("MMVP", VLMEVALKIT): _pairs(readings.letter_kit),
    ("RealWorldQA", LMMS_EVAL): _realworldqa,
    ("RealWorldQA", VLMEVALKIT): _choice_of(readings.letter_kit),
    ("CVBench-2D", LMMS_EVAL): _choice(readings.letter_cv_bench),
    ("CVBench-2D", VLMEVALKIT): _mean_over("source", readings.letter_kit),
    ("DocVQA", LMMS_EVAL): _nearest,
    ("DocVQA", VLMEVALKIT): _nearest,
    ("InfoVQA", LMMS_EVAL): _nearest,
    ("InfoVQA", VLMEVALKIT): _nearest,
    ("ChartQA", LMMS_EVAL): _exact,
    ("ChartQA", VLMEVALKIT): _exact,
    ("OCRBench", LMMS_EVAL): _contained,
    ("OCRBench", VLMEVALKIT): _contained,
    ("AI2D", LMMS_EVAL): _choice(readings.letter_ai2d),
    ("AI2D", VLMEVALKIT): _choice_of(readings.letter_kit),
    ("MMStar", LMMS_EVAL): _mean_over("hint", _whole(readings.letter_capital)),
    ("MMStar", VLMEVALKIT): _choice_of(readings.letter_kit),
    ("MMMU", LMMS_EVAL): _mmmu_lmms_eval,
    ("MMMU", VLMEVALKIT): _mmmu_kit,
    ("MMBench-CN", LMMS_EVAL): _choice_of(readings.letter_mmbench),
    ("MMBench-CN", VLMEVALKIT): _circular,
    ("AMBER", VLMEVALKIT): _mean_over("category", _whole(readings.yes_no_kit), "answer"),
    ("TextVQA-OCR", LMMS_EVAL): _soft,
}
