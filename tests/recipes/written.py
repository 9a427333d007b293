"""Recipes as texts, and random ones as plain data, for what must hold of every recipe."""

import random

from recipes.language import parse

TOP = "schema_version: 1\nname: mine\nprompts: {source: a red cat, target: a blue dog}\n"
SEEDS = 40


def loaded(folder, text, *overrides, top=TOP):
    """A recipe written to a file of its own, beneath the usual top of three lines."""
    (folder / "mine.yaml").write_text(top + text, encoding="utf-8")
    return parse.load(str(folder / "mine.yaml"), overrides)


SPANS = [None, 3, [1, 4], {"only": [0, 2]}, {"progress": [0, 0.5]}, {"first": 2}, {"last": 1}, {"every": 2, "from": 1}]
AREAS = ["video", "text", "hole", "cat", {"word": "red cat"}, {"words": ["cat", "red"]}, {"frames": [0, 2]}]
AREAS += [{"box": [0, 1, 2, 3]}, {"sinks": {"threshold": 5, "tokens": "all"}}, {"sinks": {}}]
STRENGTHS = [0, 0.5, 1, -2, {"from": 1, "to": 0}, {"from": 0, "to": 2, "start": 0.1, "stop": 0.6, "shape": "cosine"}]
KEYS = {
    "transfer": [
        {"source": "0"},
        {"source": {"constant": "mean"}, "tensors": "q"},
        {"source": {"stored": {"step": 3}}, "mapping": {"match": {}}},
        {"source": {"itself": True}, "mapping": [1, 0]},
    ],
    "extend": [{"source": "0", "pool": [1, 4, 4]}, {"source": "0", "columns": "hole", "bias": -1.5}],
    "bias": [{"amount": -2}, {"amount": float("-inf"), "columns": {"not": "hole"}}],
    "table": [{"groups": ["video", "text"], "values": [[0, float("-inf")], [1, 2]]}],
    "lamic": [{"subjects": [{"text": {"word": "cat"}, "region": "hole"}], "switch": 0.1}],
    "sparsify": [{"keep": 0.1}, {"keep": 0.5, "renormalise": False}],
    "window": [{"frames": 1}, {"radius": 2.5, "shape": "square"}, {"band": 1.5, "order": "token"}],
    "reweight": [
        {"columns": {"word": "cat"}, "factor": 2},
        {"columns": {"sinks": {}}, "factor": 0.6, "mode": "redistributed", "to": "video"},
    ],
    "scale": [{"tensor": "o", "factor": 0}],
    "temper": [{"factor": 1.5}],
    "rotate": [{"drop": True}, {"shift": [0, 10, 10], "axes": ["row", "column"], "band": [0, 0.5]}],
    "fork": [{"variant": "identity"}, {"variant": {"edited": [{"op": "seg"}]}, "gate": "soft", "merge": "lse"}],
    "shift": [{"direction": {"from": "0", "to": "1"}, "keep_norm": True}],
    "filter": [{"cutoff": 0.25, "axes": ["frame"], "high": 0.5}],
    "skip": [{}, {"what": "attention"}],
    "reuse": [{"every": 3}],
    "identity": [{}, {"form": "mass"}],
    "seg": [{"over": "all"}],
}
TEXTS = [
    "a red cat",
    "the red cat: 5 #1",
    'a "red" ${cat} red cat',
    "ein großer red cat – $$ {x}",
    "red cat\n  yes: no",
]


def some_area(draw, deep=2):
    if deep and draw.random() < 0.3:
        inner = [some_area(draw, deep - 1) for _ in range(draw.randint(1, 3))]
        return draw.choice([{"not": inner[0]}, {"all": inner}, {"any": inner}])
    return draw.choice(AREAS)


def some_edit(draw):
    op = draw.choice(list(KEYS))
    edit = {"op": op, **draw.choice(KEYS[op])}
    shared = {"rows": some_area(draw), "strength": draw.choice(STRENGTHS), "prompts": draw.choice([["1"], ["2", "1"]])}
    shared |= {name: draw.choice(SPANS) for name in ("steps", "layers", "heads")}
    shared |= {"kinds": draw.choice([["joint"], ["self", "cross"]]), "guidance": draw.choice(["both", "conditional"])}
    for name in ("rows", "steps") if op == "lamic" else ("rows",) if op == "identity" else ():
        del shared[name]
    return edit | {name: value for name, value in shared.items() if draw.random() < 0.5}


def some_recipe(seed):
    draw = random.Random(seed)
    edits = [some_edit(draw) for _ in range(draw.randint(0, 4))]
    guide = {"weight": draw.choice(STRENGTHS), "perturb": [some_edit(draw)], "steps": draw.choice(SPANS)}
    return {
        "schema_version": 1,
        "name": f"random {seed}",
        "prompts": [draw.choice(TEXTS) for _ in range(3)],
        "variables": draw.choice([{}, {"word": "cat", "many": [1, {"a": None}], "n": 1.5}]),
        "masks": {
            "hole": draw.choice([{"box": [0, 0, 2, 2]}, {"frames": [1, 3]}]),
            "cat": {"word": "cat", "threshold": draw.choice(["otsu", 0.25]), "layers": draw.choice(SPANS)},
            "soft": {"words": ["red cat"], "soft": True, "rivals": ["red"], "prompt": "1"},
        },
        "edits": edits,
        "guides": [guide] if draw.random() < 0.3 else [],
        "latents": draw.sample([{"op": "nudge"}, {"op": "shuffle"}, {"op": "renew", "times": 2}], draw.randint(0, 2)),
        "call": draw.choice([{}, {"height": 64, "text": "${x}"}]),
        "departures": draw.sample(TEXTS, 2),
    }
