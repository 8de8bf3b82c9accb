"""What a call costs the host, counted and not timed: beside the stock model of the same shape, 32 layers."""

from __future__ import annotations

import pytest

from tests import host_costs
from tests.host_costs import counts


@pytest.fixture(scope="module")
def models():
    return host_costs.models()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("policy", ["full", "image", "image_text", "fastv,k=3", "random", "divprune"])
def test_a_call_asks_no_more_of_the_host_than_the_stock_model(models, policy, batch):
    stock, ours = models
    ours.set_sparsity(policy=policy)
    (prefill, prefill_reads), (step, step_reads) = counts(ours, batch)
    (stock_prefill, _), (stock_step, _) = counts(stock, batch)
    assert prefill_reads <= (3 if policy != "random" else 3 + batch) and step_reads <= 1
    # The gate's own work, predictor and packing included; a policy's loop over tokens is its own.
    assert policy == "divprune" or prefill <= stock_prefill + 150
    assert step <= stock_step + 35


def test_the_table_of_host_costs(monkeypatch, tmp_path):
    """As docs/speed.md says it is made; every policy beside the stock model."""
    monkeypatch.setattr(host_costs, "REPEATS", 1)
    host_costs.main([str(tmp_path / "host.md")])
    text = (tmp_path / "host.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + len(host_costs.POLICIES) and "stock LLaVA" in lines[2]
