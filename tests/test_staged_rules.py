"""HoloV, HiPrune, V2Drop, SparseVLM, PyramidKV, a threshold and schedules against plain, slow versions of their rules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.hiprune import HiPrune
from dynllava_plugin.policies.holov import HoloV
from dynllava_plugin.policies.registry import describe, parse_policy
from dynllava_plugin.policies.sparsevlm import density_peaks
from tests.families.checkpoints import FAMILIES
from tests.families.oracle import attention_at, hidden_at, oracle_logits, with_tokens
from tests.families.ours import answers_of, model_of, stock_of
from tests.property_tests import examples
from tests.test_equivalence import CLOSE
from tests.test_families import SIZES, batch_for, units
from tests.test_families import step_by_step as step_by_step_of_family
from tests.test_policy_rules import MODEL, drawn, patches_of, plain_cls_attention, seeds, some_samples
from tests.test_rival_rules import plain_snapkv, policy_named
from tests.tiny_random import batch_of


def best(scores, count):
    """Places of the `count` highest, in order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


@examples(20)
@given(seed=seeds, tokens=st.integers(2, 40), n=st.integers(1, 30), crops=st.integers(1, 9))
def test_holov_spreads_the_budget_over_crops(seed, tokens, n, crops):
    patches = patches_of(seed, tokens)
    kept, crops = min(n, tokens), min(crops, tokens)
    found = HoloV(n=n, crops=crops, beta=0.7).reduce_patches(patches).keep
    for image in range(2):
        attention = plain_cls_attention(patches.query[image], patches.key[image], 2)
        sizes = [tokens // crops + (c < tokens % crops) for c in range(crops)]
        runs, weights, start = [], [], 0
        for size in sizes:
            run = list(range(start, start + size))
            start += size
            variances = []
            for i in run if size > 1 else []:
                cosines = [
                    0.0
                    if i == j
                    else float(torch.cosine_similarity(*patches.hidden[image][[i, j]].double(), dim=0))
                    for j in run
                ]
                mean = sum(cosines) / (size - 1)
                variances.append(sum((c - mean) ** 2 for c in cosines) / (size - 1))
            level = sum(float(attention[i]) for i in run) / size
            # Variance is scaled to the attention's mean, so that a crop's weight is 1 + beta of it.
            scaled = [v * level / (sum(variances) / size) for v in variances]
            weights.append(level + 0.7 * (sum(scaled) / size if scaled else 0))
            runs.append(run)
        parts = [math.floor(w / sum(weights) * kept) for w in weights]
        order = sorted(range(crops), key=lambda c: -weights[c])
        for c in order[: kept - sum(parts)]:
            parts[c] += 1
        parts = [min(p, s) for p, s in zip(parts, sizes, strict=True)]
        for c in order:
            parts[c] += min(kept - sum(parts), sizes[c] - parts[c])
        expected = [run[i] for run, p in zip(runs, parts, strict=True) for i in best(attention[run], p)]
        assert len(expected) == kept and found[image].nonzero()[:, 0].tolist() == expected


@examples(20)
@given(seed=seeds, side=st.integers(2, 6), n=st.integers(1, 30), alpha=st.sampled_from([0.1, 0.6, 1.0]))
def test_hiprune_keeps_anchors_buffers_and_registers(seed, side, n, alpha):
    total = side * side
    patches = patches_of(seed, total)
    patches.earlier = (drawn(seed + 7, *patches.query.shape), drawn(seed + 8, *patches.query.shape))
    found = HiPrune(n=n, alpha=alpha).reduce_patches(patches).keep

    def received(query, key):
        """Of each patch, by every row of every head."""
        heads, rows = patches.heads, total + 1
        width = query.shape[-1] // heads
        sums = torch.zeros(rows, dtype=torch.float64)
        for head in range(heads):
            cut = slice(head * width, (head + 1) * width)
            for row in range(rows):
                sums += torch.softmax(key[:, cut].double() @ query[row, cut].double() / width**0.5, 0)
        return sums[1:]

    for image in range(2):
        kept = min(n, total)
        count = min(round(kept * alpha / 5), kept // 5)
        anchors = best(received(*(states[image] for states in patches.earlier)), count)
        near = {min(max(a + d, 0), total - 1) for a in anchors for d in (0, -1, 1, -side, side)}
        late = received(patches.query[image], patches.key[image])
        rest = sorted(set(range(total)) - near, key=lambda i, late=late: -float(late[i]))
        assert found[image].nonzero()[:, 0].tolist() == sorted([*near, *rest[: kept - len(near)]])


def test_hiprune_looks_at_the_layer_it_names():
    _, samples = some_samples(31)
    kept = []
    for layer in (1, 2):
        MODEL.set_sparsity(policy="hiprune", n=10, alpha=0.5, object_layer=layer)
        with torch.no_grad():
            kept.append(MODEL(**batch_of(samples)).image_keep)
    assert not torch.equal(*kept)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_v2drop_ranks_what_is_left_by_its_change(family):
    """The stock model under masks: at each gate the tokens that the layer before moved farthest."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(policy="v2drop,ratio=0.6")
    assert model._llm.policy.layers == (1, 2, 3)
    sample = batch_for(family, SIZES)[1][1]
    answers = answers_of(family, 1, 4, 1)
    logits, _ = step_by_step_of_family(model, sample, answers)
    length = sample["input_ids"].shape[1]
    images = units(model, family, SIZES[1], sample)
    left, keeps = images, {}
    for gate in (1, 2, 3):
        moved = hidden_at(stock, sample, gate, dict(keeps)) - hidden_at(stock, sample, gate - 1, dict(keeps))
        far = [math.dist(row, [0.0] * len(row)) for row in moved.double().tolist()]
        counts = [max(1, math.floor(0.6**gate * len(places) + 1e-9)) for places in images]
        left = [p[best([far[i] for i in p.tolist()], n)] for p, n in zip(left, counts, strict=True)]
        keep = torch.ones(length, dtype=torch.bool)
        keep[torch.cat(images)] = False
        keep[torch.cat(left)] = True
        keeps[gate] = keep
    assert torch.equal(model(**sample).image_keep[0], keeps[3][torch.cat(images)])
    longer = with_tokens(sample, answers[0, :-1].tolist())
    keeps = {gate: torch.cat([keep, torch.ones(3, dtype=torch.bool)]) for gate, keep in keeps.items()}
    expected = oracle_logits(stock, longer, keeps=keeps)[length - 1 :]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sparsevlm_ranks_by_the_attention_of_raters(family):
    """Without recycling, the stock model under masks; one gate, so that each rater and row is computed by hand."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(policy="sparsevlm,at=2,keep=0.4,recycled=0")
    sample = batch_for(family, SIZES)[1][1]
    length = sample["input_ids"].shape[1]
    images = units(model, family, SIZES[1], sample)
    places, states = torch.cat(images), hidden_at(stock, sample, 0).double()
    words = [i for i in range(length) if i > int(places.max())]
    like = torch.zeros(len(words), dtype=torch.float64)
    for place in places.tolist():
        like += torch.softmax(torch.tensor([float(states[place] @ states[w]) for w in words]).double(), 0)
    like /= len(places)
    raters = [w for w, value in zip(words, like, strict=True) if value > like.mean() * (1 - 1e-3)]
    assert 0 < len(raters) < len(words)
    rows = attention_at(stock, sample, 1)[:, raters].mean((0, 1))
    keep = torch.zeros(length, dtype=torch.bool)
    for image in images:
        keep[image[best(rows[image], max(1, math.floor(0.4 * len(image) + 1e-9)))]] = True
    assert torch.equal(model(**sample).image_keep[0], keep[places])


@examples(20)
@given(seed=seeds, total=st.integers(2, 30), budget=st.integers(1, 29), recycled=st.sampled_from([0.3, 1.0]))
def test_sparsevlm_merges_what_goes(seed, total, budget, recycled):
    """One image between two words, the second its rater's row; merged tokens are means at their centres' places."""
    from dynllava_plugin.policies.points import Gate, TokenLayout

    budget = min(budget, total)
    policy = policy_named(f"sparsevlm,at=2,keep={budget / total},recycled={recycled}")
    hidden, attention = drawn(seed, 1, total + 2, 5), drawn(seed + 1, 1, total + 2).softmax(-1)
    image = torch.zeros(1, total + 2, dtype=torch.bool)
    image[:, 1:-1] = True
    layout = TokenLayout(
        image_mask=image, image_lengths=(total,), image_rows=(0,), image_index=image[0].nonzero()[:, 0]
    )
    gate = Gate(hidden, image | True, image.long(), layout, attention=attention, layer=2)
    found = policy.image.keep_image(gate)
    states, score = hidden[0, 1:-1].double(), attention[0, 1:-1].tolist()
    over = total - budget
    merged = min((int(recycled * over) + 1) // 10 + 1, budget // 2) if over else 0
    stay = best(score, budget - merged)
    expected = {i: states[i] for i in stay}
    if merged:
        gone = sorted((i for i in range(total) if i not in stay), key=lambda i: -score[i])
        pool = gone[: max(merged, min(int(recycled * len(gone)) + 1, len(gone)))]

        def apart(i, j):
            return math.dist(states[i].tolist(), states[j].tolist()) / 5**0.5

        density = {
            i: math.exp(-sum(d * d for d in sorted(apart(i, j) for j in pool)[:merged]) / merged)
            for i in pool
        }
        farthest = max(apart(i, j) for i in pool for j in pool)
        peak = {
            i: density[i] * min((apart(i, j) for j in pool if density[j] > density[i]), default=farthest)
            for i in pool
        }
        centres = sorted(pool, key=lambda i: -peak[i])[:merged]
        clusters = {c: [c] for c in centres}
        for i in pool:
            if i not in centres:
                clusters[min(centres, key=lambda c, i=i: apart(i, c))].append(i)
        expected |= {c: sum(states[i] for i in members) / len(members) for c, members in clusters.items()}
    assert found.count == budget and found.keep[0].nonzero()[:, 0].tolist() == sorted(expected)
    mean = torch.stack([expected[i] for i in sorted(expected)]).float()
    torch.testing.assert_close(found.tokens[0][found.keep[0]], mean, **CLOSE)


def test_density_peaks_find_the_heaps():
    heaps = torch.tensor([0.0, 10.0, 20.0]).repeat_interleave(5)
    states = (heaps[:, None] + drawn(3, 15, 4) / 10)[None]
    centres, cluster = density_peaks(states, 3)
    assert sorted((centres[0] // 5).tolist()) == [0, 1, 2]
    assert all(len(set(part.tolist())) == 1 for part in cluster[0].split(5))


@torch.no_grad()
def test_recycling_through_the_model():
    """What is merged at a gate is what the layers behind it see: other logits than without, the same tokens before."""
    _, samples = some_samples(33)
    logits = []
    for recycled in (0, 1):
        MODEL.set_sparsity(policy=f"sparsevlm,at=3,keep=0.4,recycled={recycled}")
        logits.append(MODEL(**batch_of(samples)).logits[:, -1])
    assert (logits[0] - logits[1])[:2].abs().amax() > 1e-3  # the last sample has no image
    torch.testing.assert_close(logits[0][2], logits[1][2], **CLOSE)


def test_pyramidkv_cuts_each_layer_to_its_share():
    """SnapKV's plain version, each layer with its own share: 0.4 in the mean of three layers, a fourth of it in the last."""
    from tests.test_equivalence import step_by_step

    rng, samples = some_samples(22)
    answers = torch.tensor([[rng.randrange(3, 80) for _ in range(4)] for _ in samples])
    MODEL.set_sparsity(policy="pyramidkv,r=0.4,window=4,kernel=3,beta=4,start_layer=2")
    logits, cache = step_by_step(MODEL, batch_of(samples), answers)
    shares = [None, None, 0.7, 0.4, 0.1]
    for row, sample in enumerate(samples):
        with torch.no_grad():
            expected, held = plain_snapkv(sample, answers[row, :-1].tolist(), shares, 4, 3)
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        assert cache.kept_lengths()[:, row].tolist() == held
    steep = policy_named("pyramidkv,r=0.7", 4).cache
    assert [round(steep.share_at(layer, 4), 6) for layer in (2, 3)] == [1.0, 0.4]  # none holds more than all
    assert policy_named("pyramidkv", 32).splits == tuple(range(2, 32))


@torch.no_grad()
def test_a_threshold_is_a_budget_that_each_image_decides():
    _, samples = some_samples(34)
    batch = batch_of(samples)
    llm, counts = MODEL._llm, set()
    thresholds = [0.5, 0.999]
    for threshold in thresholds:  # two more come from the first answer
        MODEL.set_sparsity(policy="image", threshold=threshold, layer=2)
        seen = []
        handle = llm.image_predictor.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out)
        )
        keep = MODEL(**batch).image_keep
        handle.remove()
        probability = torch.softmax(seen[0].double(), -1)[..., 0]  # the first of the two says keep
        if len(thresholds) == 2:
            thresholds += [
                float(p) for p in probability.flatten().quantile(torch.tensor([0.3, 0.7]).double())
            ]
        flat = torch.cat([keep[0, :16], keep[1, :32]]).view(3, 16)
        for mine, p in zip(flat, probability, strict=True):
            expected = [i for i in range(16) if p[i] > threshold] or [int(p.argmax())]
            assert mine.nonzero()[:, 0].tolist() == expected
            counts.add(len(expected))
    assert len(counts) > 3


def test_published_schedules():
    """SparseVLM's and V2Drop's numbers for LLaVA-1.5 on 32 layers, and a budget solved for their gates."""
    sparse = policy_named("sparsevlm,shares=0.521-0.348-0.191")
    assert sparse.image.left(576) == (300, 200, 110) and sparse.layers == (3, 7, 16)
    variation = policy_named("v2drop,shares=0.5-0.25-0.001")
    assert variation.image.left(576) == (288, 144, 1) and variation.layers == (3, 17, 22)
    assert round(variation.image_tokens(576, 1, 32), 2) == 202.81
    for name in ("sparsevlm", "v2drop"):
        for tokens in (192, 128):
            policy = policy_named(f"{name},tokens={tokens}")
            assert tokens - 2 < policy.image_tokens(576, policy.kept_tokens(576), 32) <= tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_schedule_is_its_steps_one_behind_the_other(family):
    """FastV's rows at 1, then chance at 3: shares of the whole image, chance among what is left."""
    model, stock = model_of(family), stock_of(family)
    model.set_sparsity(policy="schedule,3:random:0.3,1:fastv:0.5")
    assert model._llm.policy.layers == (1, 3)
    sample = batch_for(family, SIZES)[1][1]
    images = units(model, family, SIZES[1], sample)
    out = model(**sample, use_cache=True)
    rows = attention_at(stock, sample, 0)[:, -1].mean(0)
    start = 0
    for places in images:
        early = set(best(rows[places], max(1, math.floor(0.5 * len(places) + 1e-9))))
        late = set(out.image_keep[0, start : start + len(places)].nonzero()[:, 0].tolist())
        start += len(places)
        assert late <= early and len(late) == max(1, math.floor(0.3 * len(places) + 1e-9))
    lengths = out.past_key_values.kept_lengths()[:, 0].tolist()
    text = sample["input_ids"].shape[1] - sum(map(len, images))
    halves = sum(max(1, math.floor(0.5 * len(places) + 1e-9)) for places in images)
    assert lengths[0] == text + sum(map(len, images)) and lengths[1:3] == [text + halves] * 2
    assert all(later < earlier for earlier, later in pairwise([lengths[0], lengths[1], lengths[3]]))


def test_a_schedules_text():
    name, arguments = parse_policy("schedule+text, 2:fastv:0.5,6:random:0.3,layer=2")
    assert (name, arguments) == ("schedule+text", {"steps": "2:fastv:0.5-6:random:0.3", "layer": 2})
    assert describe(name, arguments) == "schedule+text,steps=2:fastv:0.5-6:random:0.3,layer=2"
    assert parse_policy(describe(name, arguments)) == (name, arguments)
    policy = policy_named("schedule,6:random:0.3,2:fastv:0.5")
    assert policy.layers == (2, 6) and policy.kept_tokens(576) == 172
    assert policy.image_tokens(576, 172, 32) == (2 * 576 + 4 * 288 + 26 * 172) / 32
    fitted = policy_named("schedule,2:fastv:0.5,6:random:0.25,tokens=128").image.left(576)
    assert fitted == (173, 86)  # still half as many behind the second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule", "schedule: give its steps, such as schedule,2:fastv:0.5"),
        ("schedule,keep=0.5", "schedule: no argument 'keep'; it has tokens, steps"),
        ("schedule,steps=1.5,2:fastv:0.5", "schedule: '1.5' is not layer:policy:share"),
        ("schedule,2:fastv", "schedule: '2:fastv' is not layer:policy:share, such as 6:random:0.3"),
        ("schedule,2:fast:0.5", "policy: unknown value 'fast'"),
        ("schedule,2:fastv:1.5", r"fastv: keep=1\.5 is outside"),
        ("schedule,2:fastv:0.5,tokens=3", "schedule: no setting of it leaves tokens=3 of an image's 16; the nearest is 7"),
        ("schedule,2:schedule:0.5", "'2:schedule:0.5': schedule doesn't act there"),
        ("schedule,2:fastv:0.5,2:random:0.4", "schedule: two steps at layer 2; give one"),
        ("schedule,1:fastv:0.3,2:random:0.5", r"random at layer 2 keeps 0\.5 of an image, but fastv leaves 0\.3 before it"),
        ("schedule,9:fastv:0.5", r"fastv: layer 9 is outside the model, which has layers 0\.\.4"),
        ("schedule,2:pyramiddrop:0.5", "'2:pyramiddrop:0.5': pyramiddrop has gates of its own"),
        ("schedule,2:divprune:0.5", "'2:divprune:0.5': divprune has gates of its own"),
        ("schedule,0:fastv:0.5", "'0:fastv:0.5': fastv doesn't act there"),
        ("schedule,2:text:0.5", "'2:text:0.5': text doesn't act there"),
        ("schedule+h2o,2:fastv:0.5", "schedule has gates at several layers, h2o's cache begins at one"),
        ("image,threshold=1", r"image: threshold=1 is outside \[0, 1\): no probability is above 1"),
        ("image,threshold=0.5,keep=0.5", "image: keep and threshold say the same thing"),
        ("image_text,threshold=x", "image: threshold='x' is outside"),
        ("v2drop,shares=0.5-0.6-0.1", "v2drop: shares='0.5-0.6-0.1' is not shares in"),
        ("v2drop,shares=0.5-0.25", "v2drop: shares=0.5-0.25 names 2 gates, there are 3"),
        ("sparsevlm,recycled=2", r"sparsevlm: recycled=2 is outside \[0, 1\]"),
        ("sparsevlm,tokens=3", "sparsevlm: no setting of it leaves tokens=3 of an image's 16; the nearest is"),
        ("holov,crops=0", "holov: crops=0 is not a positive integer"),
        ("holov,beta=-1", "holov: beta=-1 is not a number of at least 0"),
        ("holov,n=1000", "holov: n=1000, but an image has 16 tokens"),
        ("hiprune,object_layer=9", "hiprune: object_layer=9, but the vision tower has"),
        ("hiprune,alpha=2", r"hiprune: alpha=2 is outside \(0, 1\]"),
        ("pyramidkv,beta=0", "pyramidkv: beta=0 is not a positive integer"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        MODEL.set_sparsity(policy=text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["holov", "hiprune", "schedule,0:holov:0.5,2:fastv:0.2"])
def test_a_family_without_a_class_token_is_told_so(name):
    family = next(f for f in FAMILIES if f.startswith("qwen"))
    with pytest.raises(UserError, match="needs the class token of a CLIP vision tower, which Qwen") as error:
        model_of(family).set_sparsity(policy=name)
    assert "\n" not in str(error.value)


def test_a_class_token_is_asked_of_the_checkpoint_too():
    """LLaVA's class with a SigLIP tower, which has none: told when the policy is chosen, not at the first image."""
    with pytest.raises(
        UserError, match=r"^visionzip: needs the class token of a CLIP .*, not of a siglip_vision_model$"
    ):
        model_of("llava_qwen2").set_sparsity(policy="visionzip")
