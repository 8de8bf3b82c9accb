"""VLMEvalKit's judged datasets, where the kit makes figures of answers that no judge gave, or can't run at all.

Its MM-Vet counts 0 points for an answer that it gets no number for, and divides by zero where a capability has no
rows (`--limit`); its LLaVA-Bench imports ``vlmeval.dataset.smp``, which doesn't exist, and takes the mean over -1
for a missing score. Here a figure that lacks answers of the judge is an error of that dataset, which the kit notes
in its `status.json`; the next run asks for what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd

from dynllava_plugin.evaluation.judges import TIMEOUT, Patience, llava_scores, mm_vet_score
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.results.results import failure

_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_NO_SCORE = -1.0
# The kit's own tries and seconds for one answer, six and 600: ours are counted around them.
BOUNDS = {"judge_retry": "1", "judge_timeout": str(TIMEOUT)}


class JudgeFailed(RuntimeError):
    """A dataset without all of its judge's scores; its text is what a table's cell says."""


def repair_judged(patches: Patches, judge: str) -> None:
    """Have MM-Vet and LLaVA-Bench scored as the module says; `judge` is the judge's address, for messages."""
    _provide_log_module()
    _repair_mm_vet(patches, Patience(f"{judge} of MMVet"))
    _repair_llava_bench(patches, Patience(f"{judge} of LLaVABench"))


def without_judge(patches: Patches, datasets: Iterable[str]) -> None:
    """Leave these datasets, which only a judge can score, at their predictions."""
    import vlmeval.dataset as kit

    def no_score(*args: Any, **kwargs: Any) -> None:
        return None

    for name in datasets:
        for dataset in kit.DATASET_CLASSES:
            if name in getattr(dataset, "DATASET_URL", {}):
                patches.put(dataset, "evaluate", lambda before: staticmethod(no_score))


def match_by_rules(patches: Patches, kit: ModuleType, datasets: Collection[str]) -> None:
    """Match the answers to `datasets` by rules, also where a judge scores what is asked beside them.

    The kit would ask it which option an answer means, and draw one where it gets no reply.
    """

    def choosing(choose: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def chosen(dataset: str, *args: Any) -> dict[str, Any]:
            found = choose(dataset, *args)
            return {**found, "model": "exact_matching"} if dataset in datasets else found

        return chosen

    patches.put(kit, "get_judge_kwargs", choosing)


def draw_nothing(patches: Patches) -> None:
    """Count an answer as wrong, as the kit's rules do, where a judge names no option for it; the kit would draw one."""
    choices: Any = importlib.import_module("vlmeval.dataset.utils.multiple_choice")
    patches.put(choices, "rd", lambda before: SimpleNamespace(choice=lambda options: "Z"))


def _provide_log_module() -> None:
    """What LLaVA-Bench's scoring imports by the wrong name; a kit that has it keeps its own."""
    name = "vlmeval.dataset.smp"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = ModuleType(name)
        sys.modules[f"{name}.log"] = importlib.import_module("vlmeval.smp.log")


def _repair_mm_vet(patches: Patches, patience: Patience) -> None:
    utils: Any = importlib.import_module("vlmeval.dataset.utils.mmvet")

    def score_sample(model: Any, line: Any) -> dict[str, Any]:
        prompt, said = utils.build_mmvet_gpt4_prompt(line), ["not asked"]

        def question(attempt: int) -> float | None:
            said.append(str(model.generate(prompt, temperature=attempt * 0.5)))
            return mm_vet_score(said[-1])

        score = patience.ask(question)
        return {"log": said[-1], "score": _NO_SCORE if score is None else score}

    def figures(result_file: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        from vlmeval.smp import dump, load

        data = load(result_file)
        missing = data["score"].isna() | (data["score"] < 0)
        if missing.any():
            path = Path(result_file)
            path.unlink()
            kept = path.with_suffix(".pkl")  # the scores as they came in
            if kept.is_file():
                unknown = set(data.loc[missing, "index"])
                dump({key: value for key, value in load(str(kept)).items() if key not in unknown}, str(kept))
            raise JudgeFailed(failure(int(missing.sum()), len(data)))
        return mm_vet_figures(data)

    patches.put(utils, "MMVet_auxeval", lambda before: score_sample)
    patches.put(utils, "MMVet_acc", lambda before: figures)


def mm_vet_figures(data: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the kit's two tables, by capability and by set of capabilities; those without a row are left out.

    The kit counts a row whose set is one capability twice in that capability; its ``Overall`` is the same.

    Parameters
    ----------
    data : DataFrame
        Columns ``category`` (capabilities, comma-separated) and ``score`` (0 to 1).

    Returns
    -------
    (DataFrame, DataFrame)
        Columns ``Category``, ``tot`` (questions) and ``acc`` (percent).
    """
    categories, scores = data["category"].astype(str), data["score"].astype(float)
    # As in the kit, a capability is looked for anywhere in the text.
    single = {name: scores[categories.str.contains(name, regex=False)] for name in _CAPABILITIES}
    names = categories.str.replace(",", "_")
    sets = {name: scores[names == name] for name in dict.fromkeys(names)}

    def table(groups: dict[str, pd.Series]) -> pd.DataFrame:
        rows = [
            {"Category": name, "tot": len(group), "acc": group.mean() * 100}
            for name, group in {**groups, "Overall": scores}.items()
            if len(group)
        ]
        return pd.DataFrame(rows)

    return table(single), table(sets)


def _repair_llava_bench(patches: Patches, patience: Patience) -> None:
    from vlmeval.dataset import LLaVABench
    from vlmeval.smp import get_intermediate_file_path

    utils: Any = importlib.import_module("vlmeval.dataset.utils.llavabench")
    make_figures, evaluate = utils.LLaVABench_score, LLaVABench.evaluate.__func__

    def score_sample(model: Any, prompt: str) -> list[float]:
        found = patience.ask(lambda attempt: llava_scores(str(model.generate(prompt))))
        return [_NO_SCORE, _NO_SCORE] if found is None else list(found)

    def figures(data: pd.DataFrame) -> pd.DataFrame:
        given = (data[["gpt4_score", "score"]] >= 0).all(axis="columns")
        if not given.all():
            raise JudgeFailed(failure(int((~given).sum()), len(data)))
        return make_figures(data)

    def evaluated(cls: Any, eval_file: str, **judge: Any) -> Any:
        try:
            return evaluate(cls, eval_file, **judge)
        except JudgeFailed:
            Path(get_intermediate_file_path(eval_file, "_openai_result")).unlink(missing_ok=True)
            raise

    patches.put(utils, "LLaVABench_atomeval", lambda before: score_sample)
    patches.put(utils, "LLaVABench_score", lambda before: figures)
    patches.put(LLaVABench, "evaluate", lambda before: classmethod(evaluated))
