"""Edits at single heads, [layer, head], and the blur of queries: what they become, and that they change just that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from probe.errors import MmditError
from recipes.catalogue import interventions
from recipes.job import prepare
from recipes.language import parse
from recipes.language.operator_tensor import Scale
from recipes.language.span import Only
from recipes.studio import Studio
from tests import tiny

OFF = {"op": "scale", "tensor": "o", "factor": 0}


def recipe(model: str, *edits: dict[str, Any], **more: Any) -> Any:
    data = {"schema_version": 1, "name": "x", "model": model, "prompts": [tiny.PROMPT], "edits": list(edits)}
    return parse.validate({**data, "sampler": {"steps": 2, "guidance": 1.0}, **more}, "x")


def handlers(model: str, *edits: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    return interventions(prepare(recipe(model, *edits, **more))).handlers


def test_places_are_one_edit_per_layer_with_its_heads():
    edit = Scale(tensor="o", factor=0, places=[(2, 1), (0, 1), (2, 0), (2, 1)], steps=1)
    first, second = edit.by_layer()
    assert (first.layers, first.heads, first.places) == (0, Only(only=[1]), None)
    assert (second.layers, second.heads, second.steps) == (2, Only(only=[0, 1]), 1)
    plain = Scale(tensor="o", factor=0, layers=1)
    assert plain.by_layer() == [plain]


def test_places_become_handlers_in_edits_guides_and_variants(toy):
    places = {"places": [[0, 1], [2, 0]]}
    wheres = [((0,), (1,)), ((2,), (0,))]
    assert [(h.where.layers, h.where.heads) for h in handlers(toy, OFF | places)] == wheres
    guide = {"weight": 1, "perturb": [{"op": "identity", "form": "whole", **places}]}
    perturbed = handlers(toy, guides=[guide])
    assert [(h.where.layers, h.where.heads, h.where.branches.role) for h in perturbed] == [
        (*where, "perturbed") for where in wheres
    ]
    (fork,) = handlers(toy, {"op": "fork", "variant": {"edited": [{"op": "temper", "factor": 2, **places}]}})
    assert str(fork) == "Fork(Edited(Temper(q by 2.0), Temper(q by 2.0)))"


def test_edits_at_other_heads_of_a_layer_do_not_clash_and_at_the_same_they_do(toy):
    take = {"op": "transfer", "tensors": "q", "source": {"constant": "mean"}}
    assert len(handlers(toy, {**take, "places": [[1, 0]]}, {**take, "places": [[1, 1]]})) == 2
    with pytest.raises(MmditError, match=r"edits\.1 transfer"):
        handlers(toy, {**take, "places": [[1, 0]]}, {**take, "places": [[1, 0], [2, 1]]})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (OFF | {"places": [[0, 0]], "layers": 1}, "must have either places or layers and heads"),
        (OFF | {"places": [[0, 0]], "heads": 1}, "must have either places or layers and heads"),
        (OFF | {"places": []}, "places must"),
        (OFF | {"places": [[0, -1]]}, "places"),
        (OFF | {"places": [[3, 0]]}, r"edits\.0\.places must lie within \[0, 3\)"),
        (OFF | {"places": [[0, 2]]}, r"edits\.0\.places must lie within \[0, 2\)"),
        ({"op": "transfer", "source": "previous_segment", "places": [[0, 0]]}, "heads in place of places"),
        ({"op": "seg", "over": "text", "sigma": 1}, "must be over video with a sigma"),
        ({"op": "seg", "sigma": 0}, "sigma must be greater than 0"),
    ],
)
def test_places_and_blurs_that_cannot_be_are_refused(toy, edit, said):
    more = {"segments": {}, "prompts": [tiny.PROMPT, tiny.OTHER]} if edit["op"] == "transfer" else {}
    with pytest.raises(MmditError, match=said):
        handlers(toy, edit, **more)


def test_a_blur_has_its_sigma_and_without_one_it_is_the_mean(toy):
    assert [
        str(one) for one in handlers(toy, {"op": "seg", "sigma": 1.5, "layers": 0}, {"op": "seg", "layers": 1})
    ] == [
        "BlurQuery(video, sigma 1.5)",
        "BlurQuery(video, sigma inf)",
    ]


def test_places_change_the_clip_as_the_same_layers_and_heads_do(toy, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(parse.dump(recipe(toy, OFF)))
    make = Studio(str(path))
    named, spelled, other = (
        make({"edits": [OFF | at]}, 0).clips["0"]
        for at in ({"places": [[1, 0]]}, {"layers": 1, "heads": 0}, {"places": [[1, 1]]})
    )
    assert np.array_equal(named, spelled)
    assert not np.array_equal(named, other)
