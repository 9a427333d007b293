"""Recording keeps what it was asked for and nothing else."""

import gc
from pathlib import Path

import pytest
import torch

import probe
from probe.readout.column import ColumnMass
from probe.readout.entropy import Entropy
from probe.readout.feature import Correspondence, Features
from probe.readout.frame import FrameMass
from probe.readout.kept import FrameWindow, KeptMass, Tube
from probe.readout.locality import Locality
from probe.readout.recovery import Recovery
from probe.readout.saliency import OutputSaliency
from probe.readout.similarity import Similarity
from probe.readout.sink import Sinks
from probe.readout.sparsity import Sparsity
from probe.readout.token import TokenMass
from tests import tiny
from tests.toys import wan

STEPS = 200


def every_readout(kind):
    """One of each readout that can look at this kind of attention."""
    masses = [Entropy(video_conditional=True), ColumnMass(), FrameMass(), Sinks(tau=1.5), Locality()]
    rows = [Sparsity(rows=2, text_rows=0), Recovery(rows=1), KeptMass(FrameWindow(1)), KeptMass(Tube())]
    tokens = [Features(), Correspondence((0, 1)), Features("o")]
    if kind == "self":
        return [*masses, *rows, *tokens]
    text = [probe.WordMaps("cat"), probe.RegionMass(), TokenMass(), OutputSaliency("cat")]
    return [*masses, *rows, *tokens, *text, Similarity(measures=("kl",), keys="video")]


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident():
    """Megabytes of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def traced_steps(after_step, *readouts, steps=STEPS, kind="joint"):
    """Steps of a model with joint attention, or of Wan."""
    if kind == "joint":
        pipe, latents, text = tiny.pipeline(), torch.randn(2, 3, 4, 8, 8), torch.randn(2, tiny.TEXT, 16)
    else:
        pipe, latents, text = wan.pipeline(), torch.randn(2, 4, 3, 8, 8), torch.randn(2, wan.TEXT, 16)
    branches = [probe.Branch(guided=False), probe.Branch()]

    @torch.no_grad()
    def drive(clock):
        for step in range(steps):
            clock.tell(step, steps, branches)
            time = torch.tensor([steps - step] * 2)
            pipe.transformer(latents, encoder_hidden_states=text, timestep=time, return_dict=False)
            after_step(step, *readouts)

    probe.trace(pipe, *readouts).run(drive, [tiny.PROMPT])


def test_memory_is_flat_over_200_traced_steps():
    tensors, memory = {}, {}

    def after_step(step, *readouts):
        for readout in readouts:
            assert len(readout.values) == 3
            readout.values.clear()
        if step in (20, 100, STEPS - 1):
            gc.collect()
            tensors[step], memory[step] = live_tensors(), resident()

    traced_steps(after_step, probe.WordMaps("cat"), probe.RegionMass())
    assert len(set(tensors.values())) == 1
    assert memory[STEPS - 1] - memory[100] <= 2


@pytest.mark.parametrize("kind", ["joint", "self"])
def test_no_readout_leaves_tensors_to_the_garbage_collector(kind):
    """Objects that refer to each other in a circle would keep q, k and v of many calls at once."""
    tensors = []

    def after_step(_, *readouts):
        for readout in readouts:
            assert readout.values
            readout.values.clear()
        tensors.append(live_tensors())

    gc.collect()
    gc.disable()
    try:
        traced_steps(after_step, *every_readout(kind), steps=8, kind=kind)
    finally:
        gc.enable()
    assert len(set(tensors[2:])) == 1


def test_what_is_kept_is_what_was_asked_for():
    """Values hold numpy arrays of their own, not views of the model's tensors."""
    maps, mass = probe.WordMaps("cat"), probe.RegionMass()
    traced_steps(lambda *_: None, maps, mass)
    assert len(maps.values) == len(mass.values) == STEPS * 3
    for value in mass.values.values():
        assert value.base is None or value.base.nbytes == value.nbytes
