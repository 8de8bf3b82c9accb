"""A Llama-like tokenizer of a few hundred pieces for the tiny LLaVA, and its processor."""

import json
import random
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES, Tile
from dynllava_plugin.easy_vqa.scenes import DESCRIPTIONS, describe, scene_questions
from dynllava_plugin.easy_vqa.writing import SHORT_ANSWER
from dynllava_plugin.model.prompts import CHAT_TEMPLATE, IMAGE_TOKEN, vicuna_v1

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN]
# A word with the space before it, a punctuation mark, a newline: words are single pieces wherever they stand.
_PIECES = Regex(r"▁?[\p{L}\p{N}]+|▁?[^\s▁\p{L}\p{N}]|\s|▁")


def corpus(tiles: list[Tile], seed: int = 0) -> list[str]:
    """Conversations with every word of the data: prompts, questions, answers, descriptions."""
    rng = random.Random(seed)
    texts = [
        vicuna_v1([(f"{IMAGE_TOKEN}\n{q}{SHORT_ANSWER}", a)]) for t in tiles[:300] for q, a in t.questions
    ]
    for _ in range(300):
        facts = [(rng.choice(COLORS), rng.choice(SHAPES)) for _ in range(4)]
        turns: list[tuple[str, str | None]] = [*scene_questions(facts, 12, rng)]
        for prompt in DESCRIPTIONS:
            turns.append((prompt, describe(facts, prompt)))
            texts.append(vicuna_v1([(f"{IMAGE_TOKEN}\n{prompt}", describe(facts, prompt))]))
        texts.append(vicuna_v1(turns))
    words = [*COLORS, *SHAPES, "yes", "no", "USER", "ASSISTANT"]
    return texts + words + [" " + word for word in words]


def build_tokenizer(tiles: list[Tile], more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Train byte-pair merges on the corpus and `more`; what they can't spell falls back to bytes, as in Llama's."""
    steps = [normalizers.Replace(" ", "▁")]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(steps)
    trained.pre_tokenizer = pre_tokenizers.Split(_PIECES, "isolated")
    printable = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    texts = [text.replace(special, " ") for text in [*corpus(tiles), *more] for special in ("</s>",)]
    texts = [text.replace(IMAGE_TOKEN, " ") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=2, initial_alphabet=printable, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)

    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    ordered = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, side: int = 128) -> LlavaProcessor:
    """LLaVA's processor for a CLIP tower of `side` x `side` pixels with 16-pixel patches: 64 tokens an image of 128 x 128."""
    size = {"height": side, "width": side}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
