"""The campaign's table: an entry point, what is typed, and what its one line must name.

``@`` in an argument stands for the folder of bad inputs (`inputs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from tests.campaign.inputs import CHECKPOINTS


@dataclass(frozen=True)
class Case:
    """`typed` for the entry point `entry` must end in one line that names one of `named`."""

    entry: str
    typed: tuple[str, ...]
    named: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.entry} {' '.join(self.typed)}"


# A correct call of each entry point, to which one wrong thing is added: arguments, then {flag: value}.
GOOD: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "show": (("@/images/good.png", "what?"), {"--output": "@/new/picture.png"}),
    "compare": ((), {"--output": "@/new", "--limit": "1"}),
    "eval": (("easy_vqa",), {"--pretrained": "tiny", "--output": "@/new", "--limit": "1"}),
    "serve": (("tiny",), {"--port": "0"}),
    "table": (("@/results",), {}),
    "convert": (("tiny", "@/new"), {}),
    "push": (("tiny",), {}),
    "build-lvis": (
        (),
        {
            "--instruct": "@/lvis.json",
            "--images": "@/images",
            "--exclude": "@/nothing.json",
            "--output": "@/new",
        },
    ),
    "bench all": ((), {"--shape": "4x256x2", "--json": "@/new/rows.json", "--device": "cpu"}),
    "bench load": ((), {"--shape": "4x256x2", "--json": "@/new/rows.json", "--device": "cpu"}),
    "bench train": ((), {"--shape": "4x256x2", "--json": "@/new/rows.json", "--device": "cpu"}),
    "bench harness": ((), {"--limit": "2", "--json": "@/new/rows.json"}),
    "lmms_eval": (
        (),
        {
            "--model": "dynllava",
            "--tasks": "easy_vqa",
            "--model_args": "pretrained=tiny",
            "--output_path": "@/new",
            "--limit": "1",
        },
    ),
    "run_vlmevalkit": (
        (),
        {"--model": "dynllava", "--data": "EasyVQA", "--pretrained": "tiny", "--work-dir": "@/new"},
    ),
    "finetune": (
        (),
        {
            "--model_name_or_path": "tiny",
            "--data_path": "@/data.json",
            "--image_folder": "@/images",
            "--output_dir": "@/new",
            "--data_cache": "@/new",
            "--use_cpu": "true",
        },
    ),
}
POSITIONAL = {"serve": 0, "convert": 0, "push": 0}
CHECKPOINT_FLAG = {"finetune": "--model_name_or_path"}
LOADING = (
    "show",
    "compare",
    "eval",
    "serve",
    "convert",
    "lmms_eval",
    "run_vlmevalkit",
    "finetune",
    "load_model",
)


def changed(entry: str, flag: str, value: str) -> tuple[str, ...]:
    """The correct call with one flag's value instead of (or beside) its own."""
    given, flags = GOOD[entry]
    return (*given, *(part for pair in {**flags, flag: value}.items() for part in pair))


def with_checkpoint(entry: str, checkpoint: str) -> tuple[str, ...]:
    """The correct call on another checkpoint."""
    if entry == "load_model":
        return (checkpoint,)
    if entry in POSITIONAL:
        given, flags = GOOD[entry]
        return (checkpoint, *given[1:], *(part for pair in flags.items() for part in pair))
    if entry == "lmms_eval":
        return changed(entry, "--model_args", f"pretrained={checkpoint}")
    return changed(entry, CHECKPOINT_FLAG.get(entry, "--pretrained"), checkpoint)


def _checkpoints() -> Iterator[Case]:
    for (name, (_, named)), entry in product(CHECKPOINTS.items(), LOADING):
        yield Case(entry, with_checkpoint(entry, f"@/checkpoints/{name}"), (named, name))


POLICIES = {
    # a policy: what its line must name
    "fastvv": "fastv",
    "": "policy",
    "nothing_like_it": "nothing_like_it",
    "fastv,k=0": "k=0",
    "fastv,k=99": "99",
    "fastv,k=two": "two",
    "fastv,r=1.5": "r",
    "fastv,r=nan": "r",
    "fastv,kk=2": "kk",
    "fastv,k": "k",
    "visionzip,n=1000": "1000",
    "visionzip,n=-1": "n",
    "h2o,tokens=0": "tokens",
    "divprune,tokens=100000": "100000",
    "random,seed=x": "seed",
    "full+full": "full",
    "learned,threshold=2": "threshold",
    "schedule,9000:fastv:0.5": "9000",
}
POLICY_FLAG = {"show": "--policy", "eval": "--policy", "serve": "--policy", "run_vlmevalkit": "--policy"}


def _policies() -> Iterator[Case]:
    for policy, named in POLICIES.items():
        for entry, flag in POLICY_FLAG.items():
            yield Case(entry, changed(entry, flag, policy), (named,))
        yield Case("compare", changed("compare", "--policies", policy), (named,))
        yield Case(
            "lmms_eval", changed("lmms_eval", "--model_args", f"pretrained=tiny,policy={policy}"), (named,)
        )
        yield Case("load_model", ("tiny", f"policy={policy}"), (named,))
        yield Case("set_sparsity", (f"policy={policy}",), (named,))
        yield Case("generate", (f"policy={policy}",), (named,))


# Values no number of that kind may have, by the flags of each entry point.
COUNTS = {
    "show": ("--max-new-tokens",),
    "compare": ("--limit", "--batch-size"),
    "eval": ("--limit", "--batch-size", "--num-processes", "--jobs"),
    "build-lvis": ("--size",),
    "bench all": ("--batch", "--new-tokens", "--text-tokens", "--image-tokens", "--repeats"),
    "bench train": ("--batch", "--text-tokens", "--repeats", "--devices", "--lengths"),
    "bench harness": ("--limit", "--batch", "--repeats"),
    "run_vlmevalkit": ("--batch-size",),
    "finetune": ("--per_device_train_batch_size", "--model_max_length", "--sparse_layer", "--save_steps"),
}
SHARES = {
    "show": ("--vision-keep-rate",),
    "compare": ("--keep",),
    "eval": ("--vision-keep-rate", "--text-keep-rate"),
    "bench all": ("--vision-keep-rate", "--text-keep-rate"),
    "run_vlmevalkit": ("--vision-keep-rate", "--text-keep-rate"),
    "finetune": ("--vision_keep_rate", "--text_keep_rate"),
}
RATES = (
    "--learning_rate",
    "--predictor_learning_rate",
    "--keep_loss_weight",
    "--weight_decay",
    "--max_grad_norm",
    "--warmup_ratio",
)


def _numbers() -> Iterator[Case]:
    for bad, kinds in (
        (("0", "-1", "many", "1.5"), COUNTS),
        (("0", "-0.1", "1.5", "nan", "inf", "half"), SHARES),
    ):
        for entry, flags in kinds.items():
            for flag, value in product(flags, bad):
                yield Case(
                    entry, changed(entry, flag, value), (flag.strip("-"), flag.strip("-").replace("-", "_"))
                )
    for flag, value in product(RATES, ("nan", "inf", "-1", "fast")):
        yield Case("finetune", changed("finetune", flag, value), (flag.strip("-"),))


OUTPUTS = {
    "show": ("--output", "/picture.png"),
    "compare": ("--output", ""),
    "eval": ("--output", ""),
    "build-lvis": ("--output", ""),
    "bench all": ("--json", "/rows.json"),
    "bench train": ("--json", "/rows.json"),
    "bench load": ("--json", "/rows.json"),
    "bench harness": ("--json", "/rows.json"),
    "lmms_eval": ("--output_path", ""),
    "run_vlmevalkit": ("--work-dir", ""),
    "finetune": ("--output_dir", ""),
    "table": ("--json", "/rows.json"),
}
PLACES = ("@/images/good.png/below", "/proc/nothing/here", "/dev/full/below", "@/loop/a")


def _outputs() -> Iterator[Case]:
    for (entry, (flag, file)), place in product(OUTPUTS.items(), PLACES):
        yield Case(entry, changed(entry, flag, place + file), (place.replace("@/", ""),))
    for place in PLACES:
        yield Case("convert", ("tiny", place), (place.replace("@/", ""),))
    for entry in ("bench all", "bench train", "show"):
        yield Case(entry, changed(entry, OUTPUTS[entry][0], "@/images/folder.png"), ("folder.png",))


def _images() -> Iterator[Case]:
    for name in ("nowhere.png", "empty.png", "text.png", "half.png", "page.html", "drawing.svg", "video.mp4",
                 "weights.png", "folder.png"):  # fmt: skip
        yield Case("show", (f"@/images/{name}", "what?", "--output", "@/new/picture.png"), (name,))
        yield Case("explain", (f"@/images/{name}",), (name,))
    yield Case("show", ("@/images/video.mp4", "what?", "--output", "@/new/picture.png"), ("video",))
    yield Case("show", ("@/images/good.png", "what?", "--output", "@/new/picture.jpg"), (".png",))


NAMES = {
    "--device": ("abacus", "cuda:99", "cpu:x", ""),
    "--dtype": ("float7", "int8", "float", ""),
    "--attn-implementation": ("fast", "flash_attention_9", ""),
}
NAMED = {
    "show": ("--device", "--dtype"),
    "compare": tuple(NAMES),
    "eval": tuple(NAMES),
    "serve": tuple(NAMES),
    "run_vlmevalkit": tuple(NAMES),
}


def _names() -> Iterator[Case]:
    for entry, flags in NAMED.items():
        for flag in flags:
            for value in NAMES[flag]:
                yield Case(
                    entry,
                    changed(entry, flag, value),
                    (flag.strip("-"), flag.strip("-").replace("-", "_"), value or "''"),
                )
    for flag, values in NAMES.items():
        key = flag.strip("-").replace("-", "_")
        for value in values:
            yield Case("load_model", ("tiny", f"{key}={value}"), (key, value or "''"))
            yield Case(
                "lmms_eval",
                changed("lmms_eval", "--model_args", f"pretrained=tiny,{key}={value}"),
                (key, value or "''"),
            )
    for entry in (*(name for name in GOOD if name != "push"), "push"):
        yield Case(entry, changed(entry, "--no-such-flag", "1"), ("--no-such-flag",))
    for entry, flag, value, named in (
        ("lmms_eval", "--tasks", "easy_vqaa", "easy_vqa"),
        ("lmms_eval", "--tasks", "", "--tasks"),
        ("lmms_eval", "--model", "dynlava", "dynllava"),
        ("lmms_eval", "--model_args", "pretrained=tiny,bogus=1", "bogus"),
        ("lmms_eval", "--model_args", "pretrained=tiny,mode=both", "both"),
        ("lmms_eval", "--model_args", "pretrained=tiny,vision_keep_rate=2", "vision_keep_rate"),
        ("lmms_eval", "--model_args", "pretrained=tiny,quantization=2bit", "2bit"),
        ("lmms_eval", "--batch_size", "many", "batch_size"),
        ("lmms_eval", "--batch_size", "0", "batch_size"),
        ("lmms_eval", "--gen_kwargs", "temprature=1", "temperature"),
        ("lmms_eval", "--limit", "some", "--limit"),
        ("run_vlmevalkit", "--data", "EasyVQAA", "EasyVQA"),
        ("run_vlmevalkit", "--model", "dynlava", "dynllava"),
        ("run_vlmevalkit", "--mode", "both", "both"),
        ("run_vlmevalkit", "--quantization", "2bit", "2bit"),
        ("run_vlmevalkit", "--prompts", "mine", "mine"),
        ("run_vlmevalkit", "--judge-base-url", "not a url", "not a url"),
        ("eval", "--harness", "both-of-them", "both-of-them"),
        ("eval", "--benchmarks", "vqav3", "vqav2"),
        ("eval", "--mode", "both", "both"),
        ("eval", "--judge-url", "not a url", "not a url"),
        ("eval", "--judge-url", "ftp://host/v1", "ftp://host/v1"),
        ("eval", "--data", "@/nowhere", "nowhere"),
        ("eval", "--images", "@/nowhere", "nowhere"),
        ("eval", "--random-seed", "-1", "seed"),
        ("eval", "--min-pixels", "-5", "pixels"),
        ("serve", "--port", "99999", "port"),
        ("serve", "--port", "-1", "port"),
        ("serve", "--port", "http", "port"),
        ("serve", "--host", "no.such.host.invalid", "no.such.host.invalid"),
        ("convert", "--to", "elsewhere", "elsewhere"),
        ("convert", "--tokenizer", "@/nowhere", "nowhere"),
        ("push", "--results", "@/nowhere", "nowhere"),
        ("table", "--format", "html", "html"),
        ("table", "--llm", "8B", "8B"),
        ("bench all", "--shape", "3x3", "3x3"),
        ("bench all", "--shape", "llava-1.5-9b", "llava-1.5-7b"),
        ("bench all", "--only", "prefil", "prefill"),
        ("bench all", "--mode", "fulll", "full"),
        ("bench all", "--path", "quick", "quick"),
        ("bench train", "--optimizer", "lion", "lion"),
        ("bench train", "--only", "everything", "everything"),
        ("bench harness", "--benchmark", "vqav3", "vqav2"),
        ("bench harness", "--harness", "none", "none"),
        ("build-lvis", "--instruct", "@/nowhere.json", "nowhere.json"),
        ("build-lvis", "--instruct", "@/garbage.json", "garbage.json"),
        ("build-lvis", "--instruct", "@/object.json", "object.json"),
        ("build-lvis", "--images", "@/nowhere", "nowhere"),
        ("build-lvis", "--exclude", "@/nowhere.json", "nowhere.json"),
        ("finetune", "--data_path", "@/nowhere.json", "nowhere.json"),
        ("finetune", "--data_path", "@/garbage.json", "garbage.json"),
        ("finetune", "--data_path", "@/object.json", "object.json"),
        ("finetune", "--data_path", "@/empty.json", "empty.json"),
        ("finetune", "--image_folder", "@/nowhere", "nowhere"),
        ("finetune", "--config", "@/garbage.json", "garbage.json"),
        ("finetune", "--resume_from_checkpoint", "@/nowhere", "nowhere"),
        ("finetune", "--mode", "both", "both"),
        ("finetune", "--optim", "adamm", "adam"),
        ("finetune", "--lr_scheduler_type", "spiral", "spiral"),
        ("finetune", "--deepspeed", "@/nowhere.json", "nowhere.json"),
    ):
        yield Case(entry, changed(entry, flag, value), (named,))
    for suite, named in (("nowhere.yaml", "nowhere.yaml"), ("understandin", "understanding"), ("@/garbage.yaml", "garbage.yaml"),
                         ("@/list.yaml", "list.yaml"), ("@/unknown-key.yaml", "benchmarkz"), ("@/images", "images")):  # fmt: skip
        yield Case("eval", (suite, "--pretrained", "tiny", "--output", "@/new"), (named,))
    for folder, named in (
        ("@/nowhere", "nowhere"),
        ("@/images/good.png", "good.png"),
        ("@/nothing-ran", "nothing-ran"),
    ):
        yield Case("table", (folder,), (named,))
    for target, named in (("@/images", "images"), ("@/images/good.png", "good.png")):
        yield Case("convert", ("tiny", target), (named,))
    for rows in ("@/nowhere.json", "@/garbage.json", "@/object.json", "@/empty.json"):
        yield Case("bench report", (rows, "--output", "@/new"), (rows[2:],))
    for line in (
        (),
        ("shwo",),
        ("--verson",),
        ("bench",),
        ("bench", "prefil"),
        ("show",),
        ("serve",),
        ("convert", "tiny"),
    ):
        yield Case("dynllava", line, ("show", "version", "prefill", "argument", "COMMAND", "required"))


SETTINGS = {
    "vision_keep_rate": ("0", "-1", "1.01", "nan", "inf", "half", "None"),
    "text_keep_rate": ("0", "-1", "1.01", "nan", "inf"),
    "sparse_layer": ("0", "-1", "400", "2.5", "two"),
    "mode": ("both", "", "3"),
    "image_policy": ("best", ""),
    "random_seed": ("-1", "1.5", "x"),
    "keep_loss_weight": ("nan", "-1", "inf"),
    "min_text_length": ("-1", "x"),
    "predictor_dim": ("0", "7"),
    "no_such_setting": ("1",),
}


def _settings() -> Iterator[Case]:
    for name, values in SETTINGS.items():
        for value in values:
            for entry in ("set_sparsity", "SparsityConfig"):
                if (entry, value) == (
                    "SparsityConfig",
                    "400",
                ):  # how many layers there are is the model's to know
                    continue
                yield Case(entry, (f"{name}={value}",), (name,))
            yield Case("load_model", ("tiny", f"{name}={value}"), (name,))
    for typed, named in (
        ("prompt_lookup_num_tokens=3", "prompt_lookup_num_tokens"),
        ("prefill_chunk_size=2", "prefill"),
        ("cache_implementation=quick", "quick"),
        ("images=0", "image"),
        ("images=2", "image"),
        ("videos=1", "video"),
        ("hidden=1", "hidden_states"),
        ("max_new_tokens=-1", "max_new_tokens"),
    ):
        yield Case("generate", (typed,), (named,))


CASES = [*_checkpoints(), *_policies(), *_numbers(), *_outputs(), *_images(), *_names(), *_settings()]
