"""Tokenizers of a few hundred pieces, of the class and with the special tokens that each family's checkpoint has."""

from __future__ import annotations

import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2 import Qwen2Tokenizer

_COLORS = "red green blue yellow black gray brown teal".split()
_SHAPES = "circle triangle rectangle square".split()
_SENTENCES = [
    "You are a helpful assistant. USER: ASSISTANT: user assistant system",
    "What color is the shape? What shape does the image contain? Is there a shape in the picture?",
    "Answer the question using a single word or phrase. yes no",
    "Describe the picture in detail. There is one shape on the left, and two shapes on the right.",
    "0 1 2 3 4 5 6 7 8 9 A. B. C. D. Answer with the option's letter from the given choices directly.",
]
TEXTS = [*_SENTENCES, *(f"The {shape} is {color}." for shape in _SHAPES for color in _COLORS)]


@functools.cache
def _trained(pieces: str, size: int = 150) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """BPE on `TEXTS`; `pieces`: "byte_level" or "metaspace". Returns the pieces by number and the merges."""
    tokenizer = Tokenizer(models.BPE())
    if pieces == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, size = pre_tokenizers.ByteLevel.alphabet(), size + 256
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        alphabet, size = [chr(code) for code in range(33, 127)], size + 95
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return tuple(sorted(model["vocab"], key=model["vocab"].get)), tuple(merges)


def llama(*added: str) -> LlamaTokenizer:
    """Llama's: <unk>, <s>, </s>, 256 bytes, pieces; `added` special tokens behind them, "<s>" before every text."""
    pieces, merges = _trained("metaspace")
    ordered = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(ordered)},
        merges=list(merges),
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        padding_side="left",
        add_bos_token=True,
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True
    )
    return tokenizer


def qwen2(pad: str, eos: str, added: list[str], names: dict[str, str] | None = None) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE; `added` special tokens behind the pieces, `names` make some attributes."""
    pieces, merges = _trained("byte_level")
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(merges),
        pad_token=pad,
        eos_token=eos,
        padding_side="left",
        extra_special_tokens=names or {},
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True
    )
    return tokenizer


def tekken() -> PreTrainedTokenizerFast:
    """Mistral's of the third generation: special tokens first ([IMG] is number 10), then byte-level pieces."""
    special = (
        "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
    )
    special += " [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT]"
    names = [*special.split(), "[/SYSTEM_PROMPT]"]
    pieces, merges = _trained("byte_level")
    vocabulary = {piece: number for number, piece in enumerate([*names, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
