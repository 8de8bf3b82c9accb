"""How each harness reads an answer, written down once more, apart from the harnesses' code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nltk import edit_distance

Options = Mapping[str, str]
_SEPARATORS = re.compile(r"[\s.()\[\],:;!*#{}]+")
_ARTICLES = ("a", "an", "the")


def plain(text: str) -> str:
    """Lower case, no full stop, no articles: enough for answers of a few words."""
    words = text.strip().lower().rstrip(".").split()
    return " ".join(word for word in words if word not in _ARTICLES)


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """VQA's soft score: the mean over the ten people of min(1, others who agree / 3)."""
    said = [plain(answer) == plain(prediction) for answer in answers]
    agree = sum(said)
    return sum(min(1.0, (agree - own) / 3) for own in said) / len(said)


def edit_score(prediction: str, answer: str) -> float:
    """ANLS of answers without runs of spaces: 1 - edit distance / length of the longer, 0 below a half."""
    score = 1 - edit_distance(prediction.lower(), answer.lower()) / max(len(prediction), len(answer))
    return score if score >= 0.5 else 0.0


def yes_no_kit(prediction: str) -> str:
    """VLMEvalKit: one of the two words and not the other."""
    words = set(re.findall(r"[a-z]+", prediction.lower()))
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else ""


def yes_no_mme(prediction: str) -> str:
    """lmms-eval's MME: within the first four characters."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "")
    return next((word for word in ("yes", "no") if word in text[:4]), "")


def letter_kit(prediction: str, options: Options) -> str:
    """VLMEvalKit by its rules: a letter standing alone among the last words, else an option's text."""
    words = [word for word in _SEPARATORS.split(prediction) if word]
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if len(prediction) > 2 * sum(map(len, options.values())):
        return ""
    return _by_text(prediction, options)


def letter_mmbench(prediction: str, options: Options) -> str:
    """lmms-eval's MMBench without a judge, for answers that are a letter or words without single capitals."""
    words = prediction.split()
    bare = [word.strip(".,:()") for word in words]
    letters = [letter for letter in "ABCDE" if letter in words] or [
        letter for letter in "ABCDE" if letter in bare
    ]
    if len(letters) == 1:
        return letters[0]
    return _by_text(prediction, options)


def letter_strict(prediction: str) -> str:
    """lmms-eval's ScienceQA: the letter alone, or "A. ..." in capitals."""
    text = prediction.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if re.match(r"[A-Z]\.", text) else ""


def letter_first(prediction: str) -> str:
    """lmms-eval's SEED-Bench: the first character."""
    return prediction.strip()[:1].upper()


def letter_cv_bench(prediction: str) -> str:
    """lmms-eval's CV-Bench: the first letter behind brackets."""
    return prediction.strip().lstrip("( ")[:1].upper()


def letter_mmvp(prediction: str) -> str:
    """lmms-eval's MMVP: A or B by itself, named as answer or option, at a word's end, or as first character."""
    text = prediction.strip()
    tries = (
        r"^\(?([AB])\)?\.?$",
        r"^\(?([AB])\)?[.\s]",
        r"answer\s+is\s+\(?([AB])",
        r"option\s+\(?([AB])",
        r"([AB])\)?(?=\s|$)",
        r"^([AB])",
    )
    for attempt in tries:
        if found := re.search(attempt, text, re.IGNORECASE):
            return found[1].upper()
    return ""


def letter_ai2d(prediction: str) -> str:
    """lmms-eval's AI2D: a capital and a full stop first, or nothing but a letter and punctuation."""
    text = prediction.strip()
    return text[0] if re.match(r"[A-Z]\.", text) else re.sub(r"[^\w\s]", "", text).upper()


def letter_capital(prediction: str) -> str:
    """lmms-eval's RealWorldQA, MMStar and MMMU, for answers that are a letter or words without capitals."""
    found = re.findall(r"[ABCD]", prediction)
    return found[0] if len(found) == 1 else ""


def _by_text(prediction: str, options: Options) -> str:
    text = prediction.lower()
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else ""
