"""Every policy of `CASES` in every way to run the model."""

from __future__ import annotations

import random
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies import POLICIES
from dynllava_plugin.sparsity.cache import SparseContextCache
from tests.policy_cases import CASES, cases
from tests.property_tests import examples
from tests.test_equivalence import CLOSE, make_samples, step_by_step
from tests.tiny_random import TOKENS_PER_IMAGE, batch_of, random_model, random_sample

MODEL = random_model()
STEPS = 4
samples_strategy = st.tuples(
    st.integers(0, 2**20),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=3),
)


def use(text):
    MODEL.set_sparsity(policy=text)
    return MODEL._llm.policy


def some_samples(seed=0):
    rng = random.Random(seed)
    return rng, [random_sample(rng, images, text) for images, text in ((1, 3), (2, 7), (0, 4))]


def answers_for(rng, samples, steps=STEPS):
    return torch.tensor([[rng.randrange(3, 80) for _ in range(steps)] for _ in samples])


def test_every_policy_is_in_the_list():
    listed = {name for case in CASES for name in re.split(r"\+(?=[^+])", case.text.split(",")[0])}
    assert set(POLICIES) <= listed


@pytest.mark.parametrize(**cases())
def test_kept_counts_order_and_shapes(case):
    policy = use(case.text)
    _, samples = some_samples()
    batch = batch_of(samples)
    with torch.no_grad():
        out = MODEL(**batch)
    columns = out.token_index
    assert out.logits.shape[:2] == columns.shape
    lengths = out.past_key_values.kept_lengths()
    for row, sample in enumerate(samples):
        images = len(sample.images)
        mine = columns[row][columns[row] >= 0]
        assert (mine.diff() > 0).all(), "tokens stay in their order"
        text = len(sample.ids) - images * TOKENS_PER_IMAGE
        kept = len(mine) - text
        is_image = batch["input_ids"][row] == MODEL.config.image_token_id
        assert int((~is_image[mine]).sum()) == text, "prompt text is never dropped"
        if case.kept is not None:
            assert kept == images * case.kept
        if out.image_keep is not None:
            assert int(out.image_keep[row].sum()) == kept
            place = is_image.nonzero()[:, 0]
            assert torch.equal(place[out.image_keep[row, : len(place)]], mine[is_image[mine]])
        if policy.cache is None:
            assert int(lengths[-1, row]) == len(mine)
        else:  # in the mean over layers, each of which rounds down
            held = lengths[policy.cache.start_layer :, row].float().mean()
            assert policy.cache.r * len(mine) - 1 < float(held) <= max(1, policy.cache.r * len(mine) + 1e-4)
        before = len(sample.ids)
        if policy.at_input:
            before = text + images * int(
                policy.image.image_stages(TOKENS_PER_IMAGE, kept / max(images, 1))[0][1]
            )
        assert int(lengths[0, row]) == before


@pytest.mark.parametrize(**cases())
@examples(2)
@given(drawn=samples_strategy)
def test_batch_single_cached_uncached_and_scored_agree(case, drawn):
    use(case.text)
    rng, samples = make_samples(drawn)
    answers = answers_for(rng, samples)
    together, cache = step_by_step(MODEL, batch_of(samples), answers)
    lengths = cache.kept_lengths()
    scored = MODEL.score(**batch_of(samples, left=rng.random() < 0.5, labels=answers.tolist()))
    for row, sample in enumerate(samples):
        alone, own = step_by_step(MODEL, batch_of([sample]), answers[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **CLOSE)
        assert torch.equal(lengths[:, row], own.kept_lengths()[:, 0])
        expected = alone[0].log_softmax(-1).gather(-1, answers[row][:, None])[:, 0]
        torch.testing.assert_close(scored[row][scored[row] != 0], expected, **CLOSE)
        if case.cacheless:
            for step in (0, STEPS - 1):
                torch.testing.assert_close(uncached(sample, answers[row, :step]), alone[0, step], **CLOSE)


def uncached(sample, answer):
    """Logits behind prompt and answer, from scratch."""
    ids = torch.tensor([sample.ids + answer.tolist()])
    pixels = sample.images if len(sample.images) else None
    with torch.no_grad():
        return MODEL(
            ids, pixel_values=pixels, use_cache=False, prompt_length=len(sample.ids), logits_to_keep=1
        ).logits[0, -1]


@pytest.mark.parametrize(**cases(lambda case: case.full))
def test_keeping_everything_is_full_context_exactly(case):
    rng, samples = some_samples(1)
    answers = answers_for(rng, samples)
    use("full")
    expected, _ = step_by_step(MODEL, batch_of(samples), answers)
    use(case.full)
    found, _ = step_by_step(MODEL, batch_of(samples), answers)
    assert torch.equal(found, expected)


def plain_logits(policy, sample, answer, out):
    """The last token's logits, layer by layer over all tokens, where dropped ones are only masked, by hand.

    Position ids are 0..L-1, so that agreement shows that they were preserved; or, packed, the tokens that don't enter the
    LLM are cut out first and the others counted anew.
    """
    llm = MODEL._llm
    ids = torch.tensor([sample.ids + answer.tolist()])
    length = ids.shape[1]
    keep = torch.ones(length, dtype=torch.bool)
    keep[len(sample.ids) :] = out.text_keep[0]
    images = {"pixel_values": sample.images if len(sample.images) else None}
    output = torch.arange(length)[None] >= len(sample.ids)
    tokens, _ = MODEL._embed(policy, images, ids, output=(output, 0))
    embeds, layout = tokens.hidden, tokens.layout
    inside = torch.ones(length, dtype=torch.bool)
    if out.image_keep is not None and len(sample.images):
        keep[ids[0] == MODEL.config.image_token_id] = out.image_keep[0]
    positions = torch.arange(length)[None]
    if policy.at_input and len(sample.images):
        inside[layout.image_mask[0]] = out.image_keep[0]
        choice = policy.keep_image(llm._view(0, tokens, None))
        if choice.tokens is not None:
            embeds[layout.image_mask] = choice.tokens.flatten(0, 1)
        if policy.packed_positions:
            embeds, keep, positions = embeds[:, inside], keep[inside], torch.arange(int(inside.sum()))[None]
            inside = inside[inside]
    rotary = llm.rotary_emb(embeds, position_ids=positions)
    itself = torch.eye(len(keep), dtype=torch.bool)
    causal = torch.ones(len(keep), len(keep), dtype=torch.bool).tril() & (inside | itself)
    reduced = causal & (keep | itself)
    for index, layer in enumerate(llm.layers):
        mask = causal if index < policy.gate_layer else reduced
        embeds = layer(embeds, attention_mask=mask[None, None], position_embeddings=rotary)
    return MODEL._logits(llm.norm(embeds))[0, -1]


@pytest.mark.parametrize(**cases(lambda case: case.cacheless and case.gates == 1))
def test_positions_are_as_promised_and_dropped_tokens_unseen(case):
    policy = use(case.text)
    rng, samples = some_samples(2)
    for sample in samples:
        answer = answers_for(rng, [sample])[0]
        ids = torch.tensor([sample.ids + answer.tolist()])
        pixels = sample.images if len(sample.images) else None
        with torch.no_grad():
            out = MODEL(ids, pixel_values=pixels, use_cache=False, prompt_length=len(sample.ids))
            expected = plain_logits(policy, sample, answer, out)
        torch.testing.assert_close(out.logits[0, -1], expected, **CLOSE)


@pytest.mark.parametrize(**cases())
def test_generate(case):
    use(case.text)
    _, samples = some_samples(3)
    batch = batch_of(samples)
    arguments = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)
    cached = MODEL.generate(**batch, **arguments)
    if case.cacheless:
        assert torch.equal(cached, MODEL.generate(**batch, **arguments, use_cache=False))
        assert torch.equal(cached, MODEL.generate(**batch, **arguments, cache_implementation="static"))
    alone = MODEL.generate(**batch_of(samples[:1]), **arguments)
    assert torch.equal(cached[0, -5:], alone[0, -5:])
    beams = MODEL.generate(**batch, **arguments, num_beams=2)
    assert beams.shape == cached.shape


@pytest.mark.parametrize("text", ["fastv,k=2,r=0.5", "cdpruner,n=6"])
def test_what_follows_an_answer_decides_nothing(text):
    """Tokens behind the scored answer (an end token without a label) don't change what the question kept."""
    use(text)
    rng, samples = some_samples(8)
    answers = answers_for(rng, samples)
    batch = batch_of(samples, left=True, labels=answers.tolist())
    expected = MODEL.score(**batch)
    tail = torch.tensor([[7, 9]] * len(samples))
    longer = {
        "input_ids": torch.cat([batch["input_ids"], tail], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(tail)], 1),
        "pixel_values": batch["pixel_values"],
        "labels": torch.cat([batch["labels"], torch.full_like(tail, -100)], 1),
    }
    torch.testing.assert_close(MODEL.score(**longer)[:, :-2], expected, **CLOSE)


def test_seeds_decide_chance():
    _, samples = some_samples(4)
    kept = []
    for text in ("random,seed=1", "random,seed=1", "random,seed=2"):
        use(text)
        with torch.no_grad():
            kept.append(MODEL(**batch_of(samples)).image_keep)
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    rng, samples = some_samples(5)
    answers = answers_for(rng, samples, 40)
    rates = []
    for text in ("random_text,r=0.3", "random_text,r=0.3,seed=9", "structure"):
        use(text)
        keep = step_by_step(MODEL, batch_of(samples), answers)[1].output_keep()
        rates.append(keep.float().mean())
        if text == "structure":
            assert (keep[:, 1:] != keep[:, :-1]).all()
    assert abs(rates[0] - 0.3) < 0.15 and abs(rates[1] - 0.3) < 0.15 and abs(rates[2] - 0.5) < 0.02


def test_fastv_in_eager_attention_and_of_a_later_image():
    """The same tokens with eager attention; an image in a second prompt part is ranked too."""
    _, samples = some_samples(7)
    eager = random_model(attention="eager")
    kept = []
    for model in (MODEL, eager):
        model.set_sparsity(policy="fastv", k=2, r=0.5)
        with torch.no_grad():
            kept.append(model(**batch_of(samples)).image_keep)
            first = model(torch.tensor([[1, 5, 6]]), use_cache=True)
            second = model(
                torch.tensor([samples[0].ids]),
                pixel_values=samples[0].images,
                past_key_values=first.past_key_values,
            )
            whole = model(torch.tensor([[1, 5, 6, *samples[0].ids]]), pixel_values=samples[0].images)
        assert torch.equal(second.image_keep, whole.image_keep)
    assert torch.equal(*kept)


def test_what_a_sequential_policy_cannot_do_is_said():
    use("h2o")
    ids = torch.tensor([[1, 5, 6, 7]])
    with pytest.raises(UserError, match="use_cache: h2o decides what leaves the KV cache"):
        MODEL(ids, use_cache=False)
    with pytest.raises(UserError, match="labels: h2o decides step by step"):
        MODEL(ids, labels=ids)
    with pytest.raises(UserError, match="past_key_values: made for another policy than h2o"):
        MODEL(ids, past_key_values=SparseContextCache(5, (3,)))
    with pytest.raises(UserError, match="cache_implementation: h2o lets tokens go"):
        MODEL.generate(ids, cache_implementation="static")
    cache = MODEL(ids).past_key_values
    use("h2o,r=0.9")
    with pytest.raises(UserError, match="past_key_values: made for another policy"):
        MODEL(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "policy: unknown value 'fast'; choose one of full, image, image_text"),
        ("fastv,q=1", "fastv: no argument 'q'; it has keep, tokens, k, r"),
        ("fastv,r=1", r"fastv: r=1 is outside \[0, 1\)"),
        ("fastv,r=0.5,keep=0.5", "fastv: keep and r say the same thing"),
        ("fastv,k=9", r"fastv: layer 9 is outside the model, which has layers 0\.\.4"),
        ("fastv,k=0", "fastv: k=0 is not a positive integer"),
        ("random,r=0", r"random: r=0 is outside \(0, 1\]"),
        ("random,keep=x", r"random: keep='x' is outside"),
        ("random,seed=x", "random: seed='x' is not an integer"),
        ("random_text,seed=1.5", r"random_text: seed=1\.5 is not an integer"),
        ("h2o,r=0", r"h2o: r=0 is outside \(0, 1\]"),
        ("visionzip,n=0", "visionzip: n=0 is not a positive integer"),
        ("visionzip,n=4,contextual=4", "contextual=4 leaves no dominant token among n=4"),
        ("cdpruner,n=2.5", r"cdpruner: n=2\.5 is not a positive integer"),
        ("divprune,r=2", r"divprune: r=2 is outside"),
        ("prumerge+,keep=0", r"prumerge\+: keep=0 is outside"),
        ("downsample,positions=left", "positions='left' is unknown; choose packed or original"),
        ("visionzip+divprune", "both decide image tokens"),
        ("structure,period=0", "structure: period=0 is not a positive integer"),
        ("fastv+image", "fastv and image both decide image tokens"),
        ("fastv+text", "fastv at layer 3 and text at layer 2; give them the same layer"),
        ("fastv+full", "full decides nothing"),
        ("fastv+fastv", "names a policy twice"),
        ("random+random_text,r=0.5", r"r is an argument of random and random_text; write random\.r"),
        ("random+text,q=1", "random\\+text: no argument 'q'"),
        ("fastv,k", "policy: 'k' in 'fastv,k' is not argument=value"),
    ],
)
def test_what_is_wrong_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        MODEL.set_sparsity(policy=text)
    assert "\n" not in str(error.value)


def test_features_of_another_policy_are_refused():
    _, samples = some_samples()
    batch = batch_of(samples)
    for before, after in (("full", "visionzip"), ("prumerge+", "image")):
        use(before)
        encoded = {"image": MODEL.model.get_image_features(batch["pixel_values"], return_dict=True)}
        use(after)
        with pytest.raises(UserError, match="mm_encoder_outputs: image features"):
            MODEL(batch["input_ids"], batch["attention_mask"], mm_encoder_outputs=encoded)


def test_settings_and_modes_name_policies():
    def policy(**changes):
        MODEL.set_sparsity(**changes)
        return MODEL._llm.policy

    assert policy(policy="fastv", k=1, r=0.5).kept_tokens(16) == 8
    assert policy(vision_keep_rate=0.5).name == "fastv"  # a rate doesn't change the policy
    assert policy(mode="full").name == "full"
    assert policy(mode="image_text", image_policy="random").name == "random+text"
    assert policy(mode="image").name == "random"
    assert policy(image_policy="learned").name == "image"
    assert policy(policy="learned").name == "image"
    assert policy(mode="image_text", vision_keep_rate=0.3).image.keep == 0.3
    assert policy(policy="random", vision_keep_rate=0.25).image.keep == 0.25
    for other in ({"mode": "image"}, {"image_policy": "random"}):
        with pytest.raises(UserError, match=f"{next(iter(other))}: policy=fastv says what is dropped"):
            policy(policy="fastv,k=1", **other)
    MODEL.set_sparsity(mode="image_text", vision_keep_rate=0.3)


def test_the_guides_example_is_a_policy(monkeypatch):
    """CONTRIBUTING.md's file, with its registry line, in prefill and without a cache."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    code = textwrap.dedent(text.split("```python\n")[1].split("```")[0])
    module = types.ModuleType("center")
    monkeypatch.setitem(sys.modules, "center", module)
    exec(
        compile(code.replace("from __future__ import annotations", ""), "center.py", "exec"), module.__dict__
    )
    monkeypatch.setitem(POLICIES, "center", module.Center)
    assert 'Case("center,keep=0.25", 4' in text
    use("center,keep=0.25")
    _, samples = some_samples()
    with torch.no_grad():
        kept = MODEL(**batch_of(samples)).image_keep
    middle = [5, 6, 9, 10]
    assert kept[0, :16].nonzero()[:, 0].tolist() == middle
    assert kept[1].nonzero()[:, 0].tolist() == [*middle, *(16 + place for place in middle)]


def test_policies_are_not_trained():
    use("fastv,k=2")
    MODEL.train()
    try:
        with pytest.raises(UserError, match="policy: fastv is for inference"):
            MODEL(torch.tensor([[1, 5, 6]]))
    finally:
        MODEL.eval()


def test_equivalent_tokens():
    from dynllava_plugin.policies import policy_of
    from dynllava_plugin.sparsity.config import SparsityConfig

    learned = policy_of(SparsityConfig())
    assert round(learned.image_tokens(576, 115, 32)) == 144  # the paper's 144 tokens
    fastv = policy_of(SparsityConfig(policy="fastv", policy_args={"k": 3, "r": 0.75}))
    assert fastv.image_tokens(576, fastv.kept_tokens(576), 32) == 184.5
    assert policy_of(SparsityConfig(mode="full")).image_tokens(576, 576, 32) == 576
