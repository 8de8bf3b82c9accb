"""The original layouts' slow `tokenizer.model` as a transformers 5 tokenizer that gives the same ids.

transformers' own conversion needs a protobuf runtime at least as new as sentencepiece's generated code, which
the evaluation harnesses' pins exclude; sentencepiece itself reads its file without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AddedToken, LlamaTokenizer

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import read_json


def read_original_tokenizer(directory: Path) -> LlamaTokenizer:
    """Return the tokenizer of an original LLaVA-1.5 or published Dynamic-LLaVA; the processor does its spacing."""
    if not (directory / "tokenizer.model").is_file():
        return LlamaTokenizer.from_pretrained(directory)
    tokenizer = from_sentencepiece(directory / "tokenizer.model")
    length = _settings(directory).get("model_max_length")
    tokenizer.model_max_length = length or tokenizer.model_max_length
    _add_tokens(tokenizer, directory / "added_tokens.json")
    return tokenizer


def original_spacing(directory: Path) -> str:
    """Return which of the two rules for "▁" the original code follows (`DynamicLlavaProcessor`, `spacing`).

    The published code's transformers takes the older rule, "special", where tokenizer_config.json is silent.
    """
    return "special" if _settings(directory).get("legacy") in (True, None) else "image"


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def from_sentencepiece(file: Path) -> LlamaTokenizer:
    """Return a sentencepiece BPE model with byte fallback as a `LlamaTokenizer`."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocabulary = {model.id_to_piece(index): index for index in range(model.vocab_size())}
    words = [
        piece
        for piece, index in vocabulary.items()
        if not (
            model.is_control(index)
            or model.is_unknown(index)
            or model.is_byte(index)
            or model.is_unused(index)
        )
    ]
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=_merges(sorted(words, key=lambda piece: -model.get_score(vocabulary[piece])), vocabulary),
        unk_token=model.id_to_piece(model.unk_id()),
        bos_token=model.id_to_piece(model.bos_id()),
        eos_token=model.id_to_piece(model.eos_id()),
        add_bos_token=True,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
    )


def _merges(words: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes up a piece, best score first."""
    merges = []
    for word in words:
        splits = ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        pairs = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _add_tokens(tokenizer: LlamaTokenizer, file: Path) -> None:
    """Tokens that a checkpoint added to its sentencepiece model, at their ids."""
    if not file.is_file():
        return
    for token, index in sorted(read_json(file).items(), key=lambda entry: entry[1]):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise UserError(f"{file}: {token} should have id {index}, which is not the next free one")
