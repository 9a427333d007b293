"""Operators of a recipe become the handlers they say, or are refused by their place in the recipe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from control.bank import Bank
from control.extract import ExtractMask
from control.window import Band, Window
from probe.errors import MmditError, UsageError
from probe.layout import Grid
from probe.site import Branch
from recipes.build import BUILDERS
from recipes.build_source import moved
from recipes.catalogue import branches, interventions, layer_passes
from recipes.job import prepare
from recipes.language import parse
from recipes.language.maskvalues import text_of
from recipes.language.operator import BUILT_IN
from recipes.predict import predicted
from tests import tiny

PROMPTS = {"source": tiny.PROMPT, "target": tiny.OTHER}
MASKS = {"cat": {"word": "cat", "prompt": "source", "blur": 0.5}, "left": {"box": [0, 0, 4, 2]}}
TAKE = {"op": "transfer", "source": "source", "prompts": ["target"]}
INSIDE = {"op": "scale", "tensor": "v", "factor": 2}

SAID = {
    "transfer": (TAKE, "Transfer(kv from prompt 0)"),
    "transfer with o": ({**TAKE, "tensors": "qo"}, "Transfer(q from prompt 0); Transfer(o from prompt 0)"),
    "transfer by match": ({**TAKE, "mapping": {"match": {"threshold": 0.1}}}, "Match(k > 0.1)"),
    "transfer of a constant": ({**TAKE, "source": {"constant": "mean"}}, "Transfer(kv from mean)"),
    "extend": ({**TAKE, "op": "extend"}, "Extend(video of prompt 0)"),
    "bias": ({"op": "bias", "amount": -2, "columns": "padding"}, "Bias(-2 on padding)"),
    "table": ({"op": "table", "groups": ["left", "text"], "values": [[0, -1], [1, 0]]}, "BiasTable(box(0, 0, 4, 2), "),
    "window": ({"op": "window", "frames": 1}, "Window(1 frames)"),
    "best band": ({"op": "window", "band": 0.5, "order": "worst"}, "BestBand(0.5 frames, worst)"),
    "reweight": ({"op": "reweight", "columns": {"word": "a"}, "factor": 2}, "Reweight(words(a) x 2, renormalised)"),
    "sinks": ({"op": "reweight", "columns": {"sinks": {"threshold": 4}}, "factor": 2}, "over 4 times uniform"),
    "sinks of a head": (
        {"op": "bias", "amount": 1, "columns": {"sinks": {"threshold": 4, "heads": {"first": 1}}}},
        "over 4 times uniform in heads (0,))",
    ),
    "scale": ({"op": "scale", "tensor": "o", "factor": 0, "heads": {"only": [1]}}, "heads 1,"),
    "temper": ({"op": "temper", "factor": 2, "steps": {"first": 2}}, "steps 0 to 1,"),
    "fork": ({"op": "fork", "variant": {"edited": [TAKE]}}, "Fork(Edited(Transfer(kv from prompt 0)))"),
    "shift": ({"op": "shift", "direction": {"from": "source", "to": "target"}}, "prompt 0 to prompt 1"),
    "filter": ({"op": "filter", "cutoff": 0.5, "axes": ["frame"], "layers": {"last": 1}}, "layers 2,"),
    "skip": ({"op": "skip", "what": "attention", "layers": 1}, "Skip(attention); all steps, layers 1"),
    "reuse": ({"op": "reuse", "every": 2, "steps": [1, 4]}, "full every 2 steps from step 1"),
    "sparsify": ({"op": "sparsify", "keep": 0.25}, "Sparsify(keep 0.25)"),
    "identity": ({"op": "identity"}, "Fork(Identity beside"),
    "identity, whole": ({"op": "identity", "form": "whole", "rows": "left"}, "rows box(0, 0, 4, 2)"),
    "seg": ({"op": "seg", "over": "all"}, "BlurQuery(all"),
    "words": ({**TAKE, "rows": {"word": "dog"}}, "rows words(dog)"),
    "video outside": ({**TAKE, "rows": {"not": "left"}}, "rows (video & ~box(0, 0, 4, 2))"),
    "frames outside": ({**TAKE, "rows": {"not": {"frames": [0, 1]}}}, "rows (video & ~frames(0:1))"),
    "words outside": ({**TAKE, "rows": {"not": {"word": "dog"}}}, "rows ~words(dog)"),
    "text": ({**TAKE, "rows": {"not": "video"}}, "rows ~video"),
    "mask outside": ({**TAKE, "rows": {"not": "cat"}}, "rows ~ExtractMask(cat)"),
    "both": ({**TAKE, "rows": {"all": ["cat", {"frames": [0, 1]}]}}, "rows (ExtractMask(cat) & frames(0:1))"),
    "either": ({**TAKE, "rows": {"any": ["left", {"frames": [0, 1]}]}}, "rows (box(0, 0, 4, 2) | frames(0:1))"),
}


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "rotary"
    tiny.pipeline(rotary=True).save_pretrained(folder)
    return str(folder)


def job(model, edits=(), **more):
    data = {"schema_version": 1, "name": "x", "model": model, "prompts": PROMPTS, "masks": MASKS}
    sampler = {"steps": 4, "guidance": 3.0}
    return prepare(parse.validate({**data, "sampler": sampler, "edits": list(edits), **more}, "x"))


def made_of(model, edits=(), **more):
    return interventions(job(model, edits, **more))


def handlers(model, edit, **more) -> tuple[Any, ...]:
    return made_of(model, [edit], **more).handlers


def test_every_operator_has_a_builder():
    assert set(BUILDERS) == set(BUILT_IN)


@pytest.mark.parametrize("name", SAID)
def test_a_dry_run_says_what_an_edit_became(toy, name):
    edit, said = SAID[name]
    told = predicted(job(toy, [edit]))
    assert said in told[f"edits.0 {edit['op']}"]
    assert told["edits.0 " + edit["op"]].endswith("more attention")


def test_a_dry_run_explains_the_busiest_call(toy):
    told = predicted(job(toy, [{**TAKE, "steps": [1, 3]}, {"op": "temper", "factor": 2, "steps": 2, "layers": 1}]))
    assert told["for example"].splitlines() == [
        "step 2 layer 1:",
        "  edit: Transfer(kv from prompt 0)",
        "  edit: Temper(q by 2.0)",
        "  attention",
    ]


def test_one_mask_is_one_handler_whoever_uses_it(toy):
    made = made_of(toy, [{**TAKE, "rows": "cat"}, {**INSIDE, "rows": {"not": "cat"}}])
    (found,) = made.shared
    assert isinstance(found, ExtractMask)
    assert [handler.rows for handler in made.handlers[1:]] == [found, made.handlers[2].rows]
    assert str(made.handlers[2].rows) == "~ExtractMask(cat)"
    assert made.carries == "masks of its own attention"


def test_a_mask_reads_all_its_keys(toy):
    keys = {"direction": "tv", "probabilities": "video", "layers": [1, 3], "top": 0.2, "largest": True, "propagate": 1}
    (mask,) = interventions(job(toy, [{**TAKE, "rows": "a"}], masks={"a": {"word": "cat", **keys}})).shared
    assert (mask.source, mask.direction, mask.where.layers) == (0, "tv_video", (1, 2))
    assert (mask.method, mask.value, mask.component, mask.propagate) == ("top", 0.2, True, 1)


def test_a_file_mask_of_one_frame_is_that_of_every_frame(toy):
    frame = np.zeros((1, 4, 4), bool)
    frame[0, 1, 2] = True
    edit = {**INSIDE, "rows": "drawn"}
    (handler,) = handlers(toy, edit, masks={"drawn": {"values": text_of(frame)}})
    layout = job(toy).size.layout
    inside = handler.rows.mask(layout)[layout.video_slice].reshape(3, 4, 4)
    assert inside[:, 1, 2].all()
    assert inside.sum() == 3
    with pytest.raises(UsageError, match=r"masks.drawn: A mask must have the size of the token grid, .* Got 2x4x4"):
        handlers(toy, edit, masks={"drawn": {"values": text_of(np.ones((2, 4, 4), bool))}})


def test_a_stored_source_banks_what_it_needs_and_nothing_else(toy):
    source = {"stored": {"step": 1, "prompt": "source"}}
    made = made_of(toy, [{**TAKE, "source": source, "tensors": "qk", "steps": [2, 4], "layers": [0, 2]}])
    (bank,) = made.shared
    assert isinstance(bank, Bank)
    assert bank.tensors == "qk"
    assert (bank.where.steps, bank.where.layers) == ((1,), (0, 1))
    assert bank.where.rows([Branch(prompt=0), Branch(prompt=1)]) == (0,)
    assert made.carries == "tensors of earlier steps"


def test_a_window_with_a_band_is_both(toy):
    made = handlers(toy, {"op": "window", "frames": 1, "band": 1.5, "order": "token"})
    assert [type(handler) for handler in made] == [Window, Band]
    assert (made[1].width, made[1].order) == (1.5, "temporal")


def test_prompts_and_halves_choose_the_branches(toy):
    edit = {**INSIDE, "prompts": ["target"], "guidance": "conditional"}
    where = handlers(toy, edit)[0].where
    all_branches = branches(job(toy), interventions(job(toy)))
    assert len(all_branches) == 4
    assert [b for b in all_branches if where.branches(b)] == [Branch(prompt=1)]


def test_a_ramp_is_a_function_of_progress(toy):
    ramp = {"from": 1, "to": 0, "start": 0.5, "stop": 1}
    strength = handlers(toy, {**INSIDE, "strength": ramp})[0].strength
    assert [strength(progress) for progress in (0, 0.5, 0.75, 1)] == [1, 1, 0.5, 0]


def test_moved_by_hand():
    grid = Grid(2, 3, 4)
    numbers = np.arange(24).reshape(2, 3, 4)
    got = moved(grid, (1, 0, -1))
    for (f, y, x), value in np.ndenumerate(got):
        at = (f + 1, y, x - 1)
        assert value == (numbers[at] if at[0] < 2 and 0 <= at[2] < 4 else -1)
    assert np.array_equal(moved(grid, (0, 0, 0)), numbers)
    assert (moved(grid, (5, 0, 0)) == -1).all()


def test_rotations_read_bands_and_axes(rotary):
    edit = {"op": "rotate", "shift": [0, 1, 0], "axes": ["row", "column"]}
    (turned,) = handlers(rotary, {**edit, "band": [0, 0.25]})
    assert (turned.axes, turned.band, turned.shift) == ((1, 2), ("high", 0.25), (0, 1, 0))
    assert handlers(rotary, {**edit, "band": [0.25, 1]})[0].band == ("low", 0.75)
    assert handlers(rotary, {**edit, "band": [0, 1]})[0].band is None


def test_guides_are_further_forwards_in_their_steps(toy):
    guide = {"weight": {"from": 0, "to": 2, "start": 0.5, "stop": 0.5}, "prompts": ["target"]}
    made = job(toy, guides=[{**guide, "perturb": [{"op": "identity"}]}])
    program = interventions(made)
    assert layer_passes(made, program) == [12, 12, 15, 15]
    assert predicted(made)["layer passes of each step"] == "12 in 0 to 1, 15 in 2 to 3"
    where = program.edits["guides.0.perturb.0 identity"].where
    perturbed = Branch(prompt=1, role="perturbed")
    assert [b for b in branches(made, program) if where.branches(b)] == [perturbed]


def test_a_perturbed_pass_takes_from_the_plain_source(toy):
    guide = {"weight": 1, "prompts": ["target"], "perturb": [{"op": "seg"}]}
    (transfer, _) = interventions(job(toy, [TAKE], guides=[guide])).handlers
    assert transfer.source.branch_of(Branch(prompt=1, role="perturbed")) == Branch(prompt=0)
    assert transfer.source.branch_of(Branch(prompt=1, guided=False)) == Branch(prompt=0, guided=False)


REFUSED = {
    "steps": ([{**TAKE, "steps": [2, 5]}], r"edits.0.steps must lie within \[0, 4\)"),
    "layers": ([{**TAKE, "layers": 3}], r"edits.0.layers must lie within \[0, 3\)"),
    "heads": ([TAKE, {**INSIDE, "heads": {"only": [0, 2]}}], r"edits.1.heads must lie within \[0, 2\)"),
    "frames": ([{**INSIDE, "rows": {"frames": [2, 4]}}], r"edits.0 scale: frames must lie within \[0, 3\)"),
    "box": ([{**INSIDE, "rows": {"box": [0, 0, 5, 1]}}], "edits.0 scale: A box must lie within 4 rows and 4 columns"),
    "rope": ([TAKE, {"op": "rotate", "drop": True}], "edits.1 rotate: A change of positions must have a model that"),
    "place": ([{**TAKE, "positions": "target"}], "edits.0 transfer: A change of positions"),
    "kinds": ([{**INSIDE, "kinds": ["cross"]}], "edits.0 scale: A handler must select attention of a kind"),
    "index": ([{**TAKE, "mapping": [0, 1]}], "edits.0 transfer: A mapping must have one source row below 48"),
    "stored": ([{**TAKE, "source": {"stored": {"step": 9}}}], "edits.0 transfer: stored.step must lie in 0 to 3"),
    "inner": ([{"op": "fork", "variant": {"edited": [{**TAKE, "steps": 7}]}}], r"edits.0.variant.edited.0.steps must"),
    "clash": ([TAKE, INSIDE, {**TAKE, "tensors": "v"}], "edits.2 transfer: Two edits must not change the same tensor"),
    "some heads": ([{**TAKE, "heads": [0, 2]}, {**TAKE, "heads": 1}], "edits.1 transfer: Two edits must not"),
    "some prompts": ([TAKE, {**TAKE, "prompts": ["source", "target"], "source": {"constant": "zero"}}], "edits.1 tr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_its_place(toy, name):
    edits, sentence = REFUSED[name]
    with pytest.raises(MmditError, match=sentence) as caught:
        made_of(toy, edits)
    assert "\n" not in str(caught.value)


def test_edits_apart_do_not_clash(toy):
    apart = [
        [{**TAKE, "steps": [0, 2]}, {**TAKE, "steps": [2, 4]}],
        [{**TAKE, "layers": 0}, {**TAKE, "layers": 1}],
        [{**TAKE, "heads": 0}, {**TAKE, "heads": 1}],
        [TAKE, {**TAKE, "prompts": ["source"], "source": {"constant": "mean"}}],
        [{**TAKE, "guidance": "conditional"}, {**TAKE, "guidance": "unconditional"}],
        [{**TAKE, "tensors": "q"}, {**TAKE, "tensors": "kv"}],
        [{"op": "bias", "amount": -1}, {"op": "bias", "amount": -math.inf, "columns": "padding"}],
    ]
    for edits in apart:
        made_of(toy, edits)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"latents": [{"op": "renew", "step": 4}]}, "latents.0 renew: A run must be renewed by one rule"),
        ({"latents": [{"op": "blend", "source": "source", "masks": ["cat"], "steps": 9}]}, "latents.0.steps must lie"),
        ({"guides": [{"weight": 1, "steps": 4, "perturb": [{"op": "seg"}]}]}, "guides.0.steps must lie"),
        ({"guides": [{"weight": 1, "perturb": [{"op": "seg", "layers": 3}]}]}, "guides.0.perturb.0.layers must lie"),
    ],
)
def test_guides_and_latents_are_refused_by_their_place(toy, more, sentence):
    with pytest.raises(UsageError, match=sentence):
        made_of(toy, **more)


def test_a_prompt_is_not_named_like_the_files_of_a_run(toy):
    with pytest.raises(UsageError, match="must not be named video"):
        job(toy, prompts={"video": tiny.PROMPT, "target": tiny.OTHER}, masks={})


def test_an_operator_of_a_package_builds_itself_from_the_context(toy, monkeypatch):
    from control.scale import Scale
    from recipes.language import registry
    from recipes.language.operation import Operation

    class Twice(Operation):
        op: str = "twice"

    def build(edit, context):
        return [Scale("v", 2.0, **context.address(edit))]

    monkeypatch.setattr(registry, "operator_names", lambda: ("twice",))
    monkeypatch.setattr(registry, "operator", lambda name: registry.Operator(name, Twice, build))
    (made,) = handlers(toy, {"op": "twice", "layers": [1, 3], "rows": "left"})
    assert (str(made), made.where.layers, str(made.rows)) == ("Scale(v by 2.0)", (1, 2), "box(0, 0, 4, 2)")
    with pytest.raises(UsageError, match=r"edits.0.layers must lie within \[0, 3\)"):
        handlers(toy, {"op": "twice", "layers": 3})
