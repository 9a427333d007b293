"""Mistakes in recipes: each gets one sentence with its file, line and place, before any model is loaded."""

import re
from functools import partial

import pytest

from probe.errors import RecipeError
from tests.recipes.written import loaded


@pytest.fixture
def load(tmp_path):
    return partial(loaded, tmp_path)


PREVIOUS = "{op: transfer, source: previous_segment"
TAKE = "edits: [{op: transfer, source: source, prompts: [target]"
EDIT = "edits:\n- op: bias\n  amount: 1\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("edits:\n- op: bais", "line 5: edits.0.op must name a known operator. Got 'bais'. Did you mean bias?"),
        ("edits:\n- kind: transfer", "line 5: edits.0 must be a mapping that names its op"),
        ("edits:\n- op: bias", "line 5: edits.0.amount must be given"),
        ("edits:\n- op: bias\n  amont: 1", "line 6: every key must be known. Got edits.0.amont. Did you mean amount?"),
        (f"{EDIT}  colunms: text", "Got edits.0.colunms. Did you mean columns?"),
        (f"{EDIT}  layers: {{onyl: [1]}}", r"line 7: edits.0.layers must be an index, .* Did you mean only?"),
        (f"{EDIT}  layers: {{only: [1], frist: 2}}", "Got edits.0.layers.frist. Known keys here: only."),
        (f"{EDIT}  layers: [3, 3]", r"edits.0.layers must be \[start, stop\) with 0 <= start < stop. Got \[3, 3\]"),
        (f"{EDIT}  steps: {{progress: [0.5, 0.2]}}", r"edits.0.steps must be \[start, stop\) .* <= 1"),
        (f"{EDIT}  steps: {{progress: [0, 50]}}", "edits.0.steps.progress.1 must be less than or equal to 1. Got 50"),
        (f"{EDIT}  steps: auto", "edits.0.steps must be an index"),
        (f"{EDIT}  strength: .inf", "edits.0.strength must be a finite number. Got inf"),
        (f"{EDIT}  strength: {{from: 0, to: 1, start: 0.9, stop: 0.1}}", "edits.0.strength must have start <= stop"),
        (f"{EDIT}  guidance: uncond", "edits.0.guidance must be 'both', .* Got 'uncond'. Did you mean unconditional?"),
        (f"{EDIT}  prompts: [targt]", "line 7: edits.0.prompts.0 must name a prompt. .* mean target?"),
        (f"{EDIT}  rows: vidoe", "line 7: edits.0.rows must name an area or a mask. Got 'vidoe'. Did you mean video?"),
        (f"{EDIT}  rows: {{not: vidoe}}", "line 7: edits.0.rows.not must name an area or a mask. Got 'vidoe'"),
        (f"{EDIT}  rows: {{any: [text, vidoe]}}", "edits.0.rows.any.1 must name an area or a mask. Got 'vidoe'"),
        (f"{EDIT}  rows: {{wrod: cat}}", "edits.0.rows must be video, .* Did you mean word?"),
        (f"{EDIT}  rows: {{box: [2, 0, 1, 1]}}", "edits.0.rows must be .top, left, bottom, right. with 0 <= top"),
        (f"{EDIT}  rows: {{not: {{any: [{{frames: [2, 1]}}]}}}}", "edits.0.rows.not.any.0.frames must be .start, stop"),
        ("edits: [{op: bias, amount: .inf}]", "edits.0.amount must be finite, or -.inf to hide. Got inf"),
        ("edits: [{op: table, groups: [video], values: [[1, 2]]}]", "edits.0 must have 1 rows of 1 values"),
        ("edits: [{op: window}]", "edits.0 must have frames, radius or band"),
        ("edits: [{op: rotate}]", "edits.0 must have either shift or drop"),
        ("edits: [{op: transfer, source: source, tensors: kk}]", "must be some of q, k, v, o, each once. Got 'kk'"),
        ("edits: [{op: transfer, source: sauce}]", "edits.0.source must name a prompt. .* mean source?"),
        (f"{TAKE}, objects: [cat]}}]", "edits.0.objects must be one phrase, one for each of 2 prompts"),
        (f"{TAKE}, objects: [[cat, dog]]}}]", "edits.0.objects must be one phrase for each prompt. .*turns between"),
        (f"{TAKE}, objects: [cat, horse]}}]", "edits.0.objects must have words of prompt target. Got 'horse'"),
        (f"{TAKE}, objects: {{a: 1}}}}]", "edits.0.objects must be a phrase, a list with one for each prompt"),
        (f"{TAKE}, objects: cat, tensors: qkv}}]", "edits.0 must have objects with kv of a prompt"),
        (f"{TAKE}, objects: [cat, dog], rows: video}}]", "edits.0 must have objects without rows, gate and strength"),
        (f"{TAKE}, objects: [cat, dog], strength: 0.5}}]", "edits.0 must have objects without rows, gate and strength"),
        ("segments: {}\nedits: [{op: transfer, source: previous_segment, tensors: kvo}]", "must have o by itself"),
        ("segments: 5", "segments must be a valid dictionary .* Got 5"),
        (f"{TAKE}, threshold: 0.2}}]", "edits.0 must have a threshold for objects only"),
        ("edits: [{op: transfer, source: previous_segment}]", "must not be previous_segment without segments"),
        ("edits: [{op: transfer, source: source, prompts: [source]}]", "edits.0.prompts must not be the source itself"),
        ("edits: [{op: transfer, source: {itself: true}}]", "edits.0.source must be with a mapping. Got 'itself'"),
        ("edits: [{op: transfer, source: {stored: {}}}]", "edits.0.source must name a step, a layer or another prompt"),
        (
            "edits: [{op: transfer, source: {stored: {prompt: source}}, prompts: [source]}]",
            "edits.0.source must name a step, a layer or another prompt, or be with a mapping. Got 'stored'",
        ),
        ("edits: [{op: extend, source: source, prompts: [source]}]", "edits.0.prompts must not be the source itself"),
        (
            "edits: [{op: fork, prompts: [source], variant: {edited: [{op: transfer, source: source}]}}]",
            "edits.0.variant.edited.0.source must not be the only prompt that is changed. Got 'source'",
        ),
        ("edits: [{op: shift, direction: {from: source, to: source}}]", "edits.0.direction.to must be another prompt"),
        (
            "masks: {m: {box: [0, 0, 1, 1]}}\nlatents: [{op: blend, source: source, prompts: [source], masks: [m]}]",
            "latents.0.prompts must not be the source itself. Got 'source'",
        ),
        ("edits: [{op: scale, tensor: v, factor: true}]", "edits.0.factor must be a number, not true or false. Got Tr"),
        ("sampler: {steps: true}", "sampler.steps must be a number, not true or false. Got True"),
        (f"{EDIT}  layers: [true, 3]", "edits.0.layers must be a number, not true or false. Got .True, 3."),
        (f"{EDIT}  strength: {{from: false, to: 1}}", "edits.0.strength.from must be a number, not true or false"),
        ("edits: [{op: window, frames: 1, order: token}]", "edits.0 must have a band whose order is chosen"),
        ("edits: [{op: transfer, source: {itself: false}}]", "edits.0.source.itself must be True. Got False"),
        ("edits: [{op: fork, variant: {edited: [{op: bias, amont: 1}]}}]", "edits.0.variant.edited.0.amont"),
        ("edits: [{op: shift, direction: {from: source, to: dog}}]", "edits.0.direction.to must name a prompt"),
        ("edits: [{op: rotate, drop: true, band: [0.2, 0.6]}]", "edits.0 must have a band that starts at 0"),
        ("edits: [{op: rotate, drop: true, band: [0, 0]}]", "edits.0 must have a band that starts at 0"),
        ("edits: [{op: filter, cutoff: 0.5, low: 0, high: 2}]", "edits.0 must leave one side as it is, low or high 1"),
        ("edits: [{op: identity, rows: text}]", "edits.0 must have rows with form whole only"),
        ("edits: 5", "edits must be a valid list. Got 5"),
        ("guides:\n- weight: 1\n  perturb: [{op: pag}]", "line 6: guides.0.perturb.0.op must name a known operator"),
        ("latents: [{op: bleed}]", "latents.0.op must name a known operator. Got 'bleed'. Did you mean blend?"),
        ("latents: [{op: shuffle, window: 2}]", "latents.0 must have stride <= window"),
        ("latents: [{op: blend, source: source, masks: [{word: cat}]}]", "must be an area of the video. Got 'cat'"),
        ("masks: {video: {box: [0, 0, 1, 1]}}", "masks.video must have a name of its own"),
        ("masks: {hand: {word: hand}}", "masks.hand must have words of prompt source. Got 'hand'. Its words are"),
        ("masks: {dog: {word: dgo, prompt: target}}", "masks.dog must have words of prompt target. .* mean dog?"),
        ("masks: {cat: {word: cat, rivals: [dog]}}", "masks.cat must have words of prompt source. Got 'dog'"),
        ("masks: {cat: {word: cat, words: [red]}}", "masks.cat must have either word or words"),
        ("masks: {cat: {word: cat, threshold: 0.5, top: 0.1}}", "masks.cat must have either threshold or top"),
        ("masks: {cat: {word: cat, probabilities: video}}", "masks.cat must have joint probabilities, or text with"),
        ("segments: {}\nmasks: {cat: {word: cat}}", "masks.cat must have words of prompt target. Got 'cat'"),
        ("segments: {}\nmasks: {a: {word: a, prompt: source}}", "masks.a.prompt must be found in each segment itself"),
        (f"segments: {{}}\nedits: [{PREVIOUS}, prompts: [target]}}]", "edits.0 must be for all prompts"),
        (f"segments: {{}}\nedits: [{PREVIOUS}, guidance: both}}, {PREVIOUS}, rows: dog}}]", "edits.1.rows must name"),
        ("masks: {cat: {colour: red}}", "masks.cat must be a mapping with word, words, file, box or frames"),
        ("output: {show: [source, sauce]}", "output.show.1 must name a prompt. Got 'sauce'. Did you mean source?"),
        ("record: {words: [zebra]}", "record.words.0 must be a word of its prompts. .* are: a, red, cat"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence_with_its_place(load, text, sentence):
    with pytest.raises(RecipeError, match=sentence) as refusal:
        load(text)
    assert re.match(r"mine.yaml, line \d+: ", str(refusal.value))


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"{EDIT}  columns: {{word: cat}}", "target"),
        (f"{EDIT}  columns: {{word: dog}}", "source"),
        (f"{EDIT}  columns: {{all: [video, {{not: {{words: [a, cat]}}}}]}}", "target"),
        (f"{EDIT}  prompts: [target]\n  rows: {{word: red}}", "target"),
        ("edits: [{op: extend, source: source, columns: {word: dog}, prompts: [target]}]", "source"),
        ("edits: [{op: fork, variant: {edited: [{op: skip, rows: {word: cat}}]}, prompts: [target]}]", "target"),
        ("guides: [{weight: 1, prompts: [source], perturb: [{op: seg, rows: {word: blue}}]}]", "source"),
    ],
)
def test_a_word_must_be_in_each_prompt_it_is_looked_up_in(load, text, prompt):
    with pytest.raises(RecipeError, match=f"must have words of prompt {prompt}. Got '"):
        load(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{EDIT}  prompts: [source]\n  columns: {{word: cat}}",
        "edits: [{op: extend, source: source, columns: {word: cat}, prompts: [target]}]",
        "edits: [{op: fork, variant: {edited: [{op: skip, rows: {word: cat}}]}, prompts: [source]}]",
        "guides: [{weight: 1, prompts: [source], perturb: [{op: seg, rows: {word: cat}}]}]",
        "edits: [{op: fork, variant: {edited: [{op: skip, rows: {word: cat}, prompts: [source]}]}}]",
    ],
)
def test_a_word_of_the_addressed_prompt_alone_will_do(load, text):
    load(text)


ONE = "schema_version: 1\nname: mine\nprompts: {source: a red cat}\n"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("edits: [{op: transfer, source: source}]", "edits.0.source"),
        ("edits: [{op: extend, source: source}]", "edits.0.source"),
        ("masks: {m: {box: [0, 0, 1, 1]}}\nlatents: [{op: blend, source: source, masks: [m]}]", "latents.0.source"),
    ],
)
def test_one_prompt_alone_takes_from_no_other(load, text, place):
    with pytest.raises(RecipeError, match=f"{place} must not be the only prompt that is changed. Got 'source'"):
        load(text, top=ONE)


@pytest.mark.parametrize(
    "edit",
    [
        "{op: transfer, source: source, mapping: {move: [0, 0, 1]}}",
        "{op: transfer, source: {itself: true}, mapping: {move: [0, 0, 1]}}",
        "{op: transfer, source: {stored: {layer: 1}}, layers: 2}",
        "{op: extend, source: {itself: true}, pool: [1, 2, 2]}",
        "{op: fork, variant: identity}",
    ],
)
def test_a_prompt_may_take_from_itself_where_that_changes_something(load, edit):
    load(f"edits: [{edit}]", top=ONE)


def test_a_perturbed_pass_may_take_from_its_own_plain_one(load):
    load("guides: [{weight: 1, perturb: [{op: seg}, {op: transfer, tensors: v, source: source}]}]", top=ONE)


def test_words_in_the_unconditional_half_are_refused(load):
    with pytest.raises(RecipeError, match="edits.0.columns must be no words for the unconditional half"):
        load(f"{EDIT}  columns: {{word: a}}\n  guidance: unconditional")


def test_a_soft_mask_is_for_gates(load):
    soft = "masks: {cat: {word: cat, soft: true}}\nedits:\n"
    load(f"{soft}- {{op: transfer, source: source, gate: {{not: cat}}, prompts: [target]}}")
    with pytest.raises(
        RecipeError, match="edits.0.rows must be a mask with an edge. Got 'cat'. A soft mask can be a g"
    ):
        load(f"{soft}- {{op: transfer, source: source, rows: cat, prompts: [target]}}")


def test_no_prompt_is_called_previous_segment(load):
    with pytest.raises(RecipeError, match="prompts.previous_segment must have a name of its own"):
        load("", top="schema_version: 1\nname: mine\nprompts: {previous_segment: a cat}\n")
