"""Parity with the published code on its own tiny models (float32, CPU)."""

from __future__ import annotations

import pytest
import torch

from tests.golden_case import CASES, load_case

LOGITS = dict(rtol=0, atol=2e-5)


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


def test_prefill_and_cached_decoding(case):
    golden, model = case.tensors, case.model
    with torch.no_grad():
        out = model(**case.prompt, use_cache=True)
        torch.testing.assert_close(out.logits[..., : case.vocab], golden["prefill_logits"], **LOGITS)
        assert out.image_keep[0].nonzero()[:, 0].tolist() == golden["image_keep_index"][0].tolist()
        cache = out.past_key_values
        steps, lengths, kept = [out.logits[:, -1]], [cache.kept_lengths()[:, 0]], []
        for token in golden["forced_ids"]:
            out = model(token.view(1, 1), past_key_values=cache)
            steps.append(out.logits[:, -1])
            lengths.append(cache.kept_lengths()[:, 0])
            kept.append(out.text_keep[0, 0])
    torch.testing.assert_close(torch.stack(steps, 1)[..., : case.vocab], golden["cached_logits"], **LOGITS)
    assert torch.equal(torch.stack(lengths), golden["cache_lengths"])
    if case.settings["text"]:
        assert torch.equal(torch.stack(kept)[None].long(), golden["text_keep"])
        assert torch.equal(cache.output_keep().long(), golden["text_keep"])


def test_decoding_without_cache_equals_cached(case):
    golden, model = case.tensors, case.model
    prompt = case.prompt["input_ids"]
    for step in range(0, len(golden["forced_ids"]) + 1, 3):
        ids = torch.cat([prompt, golden["forced_ids"][None, :step]], 1)
        with torch.no_grad():
            out = model(
                ids,
                pixel_values=golden["pixel_values"],
                use_cache=False,
                prompt_length=prompt.shape[1],
                logits_to_keep=1,
            )
        assert out.past_key_values is None
        torch.testing.assert_close(
            out.logits[:, -1, : case.vocab], golden["cached_logits"][:, step], **LOGITS
        )


def test_parallel_scoring_equals_cached(case):
    golden, model = case.tensors, case.model
    prompt, answer = case.prompt["input_ids"], golden["forced_ids"][None]
    ids = torch.cat([prompt, answer], 1)
    labels = torch.cat([torch.full_like(prompt, -100), answer], 1)
    scores = model.score(ids, pixel_values=golden["pixel_values"], labels=labels)
    expected = golden["cached_logits"][:, :-1].log_softmax(-1).gather(-1, answer[..., None])[..., 0]
    torch.testing.assert_close(scores[:, prompt.shape[1] :], expected, **LOGITS)
    assert (scores[:, : prompt.shape[1]] == 0).all()


def test_full_context(case):
    golden, model = case.tensors, case.model
    model.set_sparsity(mode="full")
    ids = torch.cat([case.prompt["input_ids"], golden["forced_ids"][None]], 1)
    with torch.no_grad():
        out = model(ids, pixel_values=golden["pixel_values"], use_cache=False)
    torch.testing.assert_close(out.logits[..., : case.vocab], golden["full_context_logits"], **LOGITS)


def test_training_losses_masks_and_gradients(case):
    golden, model = case.tensors, case.model
    raw = golden["train_input_ids"]
    model.train()
    model.gumbel_tau = case.settings["tau"]
    out = model(
        case.expand(raw),
        case.beside(golden["train_attention_mask"], raw, 1),
        golden["train_pixel_values"],
        labels=case.beside(golden["train_labels"], raw, -100),
        gumbel_noise=(golden["gumbel_image"], golden.get("gumbel_text")),
    )
    assert torch.equal(out.image_keep.float(), golden["train_image_mask"])
    if case.settings["text"]:
        for row, length in enumerate(case.settings["train_answers"]):
            assert torch.equal(out.text_keep[row, :length].float(), golden[f"train_text_mask_{row}"])
        torch.testing.assert_close(out.text_keep_loss, golden["train_text_reg"][0], **LOGITS)
    else:
        assert out.text_keep_loss is None
    torch.testing.assert_close(out.image_keep_loss, golden["train_image_reg"][0], **LOGITS)
    torch.testing.assert_close(out.lm_loss, golden["train_lm_loss"][0], **LOGITS)
    weight = model.config.sparsity.keep_loss_weight
    torch.testing.assert_close(out.loss, golden["train_loss"][0], rtol=0, atol=2e-5 * max(1, weight))
    out.loss.backward()
    ours = {published: p.grad for published, p in published_parameters(model).items() if p.grad is not None}
    for name, expected in case.grad_norms.items():
        norm = float(ours[name][: case.vocab].norm()) if _is_vocabulary(name) else float(ours[name].norm())
        assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    for key, expected in golden.items():
        if key.startswith("grad."):
            error = (ours[key[5:]] - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error <= 1e-4, f"{key}: {error:.1e}"


def _is_vocabulary(name):
    return name in ("model.embed_tokens.weight", "lm_head.weight")


PREDICTOR_NAMES = [
    ("image_predictor.norm.", "image_score_predictor.down_mlp.0."),
    ("image_predictor.in_proj.", "image_score_predictor.down_mlp.1."),
    ("image_predictor.blocks.", "image_score_predictor.transformer."),
    ("image_predictor.head.", "image_score_predictor.output_mlp."),
    ("text_predictor.norm.", "output_text_score_predictor.output_mlp.0."),
    ("text_predictor.in_proj.", "output_text_score_predictor.output_mlp.1."),
    ("text_predictor.head.0.", "output_text_score_predictor.output_mlp.3."),
    ("text_predictor.head.2.", "output_text_score_predictor.output_mlp.5."),
    ("text_predictor.head.4.", "output_text_score_predictor.output_mlp.7."),
    ("attention_norm", "norm1"),
    ("ffn_norm", "norm2"),
    ("qkv_proj", "attn.qkv"),
    ("out_proj", "attn.proj"),
]


def published_parameters(model):
    """Our parameters under the published names, for the LLM and the predictors."""
    named = {}
    for name, parameter in model.named_parameters():
        published = name.replace("model.language_model.", "model.")
        if "predictor" in name:
            for ours, theirs in PREDICTOR_NAMES:
                published = published.replace(ours, theirs)
            if ".transformer." in published:
                published = published.replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")
        published = published.replace("multi_modal_projector.linear_1.", "mm_projector.0.")
        published = published.replace("multi_modal_projector.linear_2.", "mm_projector.2.")
        named[published] = parameter
    return named
