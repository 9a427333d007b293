"""What `mmdit bench rewrite` times is what it says: each rewriting equals its usual form."""

from __future__ import annotations

import pytest
import torch

from probe.plan import Plan
from recipes.benches.attention import SHAPES
from recipes.benches.rewrite import Bench


@pytest.fixture(scope="module")
def bench():
    return Bench(SHAPES["tiny"], "cpu", torch.float64)


@pytest.fixture(scope="module")
def plain(bench):
    return bench.run(Plan((), 1, 1), bench.tensors)


@pytest.mark.parametrize("place", range(len(Bench(SHAPES["tiny"], "cpu", torch.float64).rewrites())))
def test_a_rewriting_equals_its_usual_form(bench, plain, place):
    rewrite = bench.rewrites()[place]
    made = bench.run(Plan(rewrite.edits, 1, 1, (bench.prompt,) * 2), bench.tensors)
    usual = rewrite.dense(*bench.tensors)
    assert float((made - usual).abs().max()) < 2e-6, rewrite.name
    assert float((usual - plain).abs().max()) > 1e-2, f"{rewrite.name} does nothing"


def test_the_table_says_how_each_was_computed_and_how_near_it_came(bench):
    methods = {method.name: method for method in bench.methods()}
    assert "bias on text columns (thin)" in methods
    assert "mask-guided sharing, masks 0.3 (gather)" in methods
    own = [method for method in methods.values() if method.error is not None]
    assert len(own) == len(bench.rewrites())
    assert own[0].error() < 1e-12
