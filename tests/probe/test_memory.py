"""Recording keeps what it was asked for and nothing else."""

import gc
from pathlib import Path

import torch

import probe
from tests import tiny

STEPS = 200


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident():
    """Megabytes of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def traced_steps(after_step):
    pipe = tiny.pipeline()
    maps, mass = probe.WordMaps("cat"), probe.RegionMass()
    traced = probe.trace(pipe, maps, mass)
    latents, text = torch.randn(2, 3, 4, 8, 8), torch.randn(2, tiny.TEXT, 16)
    branches = [probe.Branch(guided=False), probe.Branch()]

    @torch.no_grad()
    def drive(clock):
        for step in range(STEPS):
            clock.tell(step, STEPS, branches)
            pipe.transformer(latents, text, torch.tensor([STEPS - step] * 2), return_dict=False)
            after_step(step, maps, mass)

    traced.run(drive, [tiny.PROMPT])
    return maps, mass


def test_memory_is_flat_over_200_traced_steps():
    tensors, memory = {}, {}

    def after_step(step, *readouts):
        for readout in readouts:
            assert len(readout.values) == 3
            readout.values.clear()
        if step in (20, 100, STEPS - 1):
            tensors[step], memory[step] = live_tensors(), resident()

    traced_steps(after_step)
    assert len(set(tensors.values())) == 1
    assert memory[STEPS - 1] - memory[100] <= 2


def test_what_is_kept_is_what_was_asked_for():
    """Values hold numpy arrays of their own, not views of the model's tensors."""
    maps, mass = traced_steps(lambda *_: None)
    assert len(maps.values) == len(mass.values) == STEPS * 3
    for value in mass.values.values():
        assert value.base is None or value.base.nbytes == value.nbytes
