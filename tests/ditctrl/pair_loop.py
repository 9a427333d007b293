"""DiTCtrl's schedule written out literally: one forward of four clips per pair, float64, nothing shared, no code of
the project.

Follows the authors' sampler (sampling.py, VPSDEDPMPP2MSampler_MultiPrompt).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import JointCalls, patched_attention


@dataclass
class PairLoop:
    """`embeddings` [n, T, E]; T latent frames a segment, o of overlap, b transitions; sharing in `steps` x `layers`."""

    model: torch.nn.Module
    embeddings: Tensor
    length: int
    overlap: int
    transitions: int
    peak: float
    timesteps: list[int]
    alphas: Tensor  # cumulative, by training timestep
    steps: range
    layers: range
    rotary: tuple[Tensor, Tensor] | None = None
    repeats: tuple[int, ...] = ()
    columns: list[tuple[Tensor, Tensor]] | None = None  # per pair: weights [T] of the text columns, source and target
    both_regions: bool = False  # paper: the mean with the opposite region
    interior: float = 1.0  # weight of each evaluation of an interior segment; the paper's formula: one half

    def conditions(self) -> list[Tensor]:
        made = []
        for i, e in enumerate(self.embeddings):
            for _ in range(self.repeats[i] if self.repeats else 1):
                made.append(e)
            if i < len(self.embeddings) - 1:
                for j in range(1, self.transitions + 1):
                    a = j / (self.transitions + 1)
                    made.append((1 - a) * e + a * self.embeddings[i + 1])
        return made

    @property
    def frames(self) -> int:
        return self.length + (len(self.conditions()) - 1) * (self.length - self.overlap)

    def x0(self, x: Tensor, step: int) -> Tensor:
        """The blended prediction of the clean long latent [1, L, C, H, W]."""
        c, zero = self.conditions(), torch.zeros_like(self.embeddings[0])
        total, weights = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=torch.float64)
        t = self.timesteps[step]
        a = self.alphas[t].double()
        u = (len(self.timesteps) - t) / len(self.timesteps)
        g = 1 + self.peak * (1 - math.cos(math.pi * u**5)) / 2
        for k in range(len(c) - 1):
            start = [s * (self.length - self.overlap) for s in (k, k + 1)]
            clips = [x[0, s : s + self.length] for s in start]
            v = self.forward(torch.stack(clips * 2), torch.stack([zero, zero, c[k], c[k + 1]]), t, step, k)
            for member in (0, 1):
                guided = v[member] + g * (v[2 + member] - v[member])
                clean = a.sqrt() * clips[member] - (1 - a).sqrt() * guided
                for j in range(self.length):
                    w = min(2 * (j + 0.5) / self.length, 2 - 2 * (j + 0.5) / self.length)
                    w *= 1.0 if k + member in (0, len(c) - 1) else self.interior
                    total[0, start[member] + j] += w * clean[j]
                    weights[start[member] + j] += w
        return total / weights.view(1, -1, 1, 1, 1)

    def forward(self, x: Tensor, text: Tensor, t: int, step: int, pair: int) -> Tensor:
        """[u_k, u_k+1, c_k, c_k+1]; in the window the second and fourth read keys and values of the first and third."""
        seen: list[Tensor] = []
        grid = self.length // (self.model.config.patch_size_t or 1) * (x.shape[-1] // 2) * (x.shape[-2] // 2)
        calls = JointCalls(len(self.model.transformer_blocks), text.shape[1] + grid)

        def shared(plain, q, k, v, **rest):
            at = calls.next(q)
            if at is not None and self.columns is not None:
                seen.append((q[2:] @ k[2:].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1))
                if step in self.steps and at[1] in self.layers:
                    return self.masked(q, k, v, sum(seen) / len(seen), text.shape[1], pair)
            if at is not None and step in self.steps and at[1] in self.layers:
                rows = [plain(q[i : i + 1], k[s : s + 1], v[s : s + 1], **rest) for i, s in enumerate((0, 0, 2, 2))]
                return torch.cat(rows)
            return plain(q, k, v, **rest)

        with torch.no_grad(), patched_attention(shared):
            return self.model(x, text, torch.full((4,), t), image_rotary_emb=self.rotary, return_dict=False)[0]

    def masked(self, q, k, v, a: Tensor, text: int, pair: int) -> Tensor:
        """Two attentions with dense masks, mixed by the target's mask; `a` [2, N, N] is the mean map so far."""
        source, target = (self.mask(a[i], text, self.columns[pair][i]) for i in (0, 1))
        n = a.shape[-1]
        outs = []
        for item in range(4):
            if item in (0, 2):
                outs.append((q[item] @ k[item].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v[item])
                continue
            logits = q[item] @ k[item - 1].transpose(-1, -2) / q.shape[-1] ** 0.5
            kinds = []
            for hidden in (~source, source):
                bias = torch.zeros(n, n, dtype=q.dtype)
                bias[text:, text:] = torch.where(hidden, -math.inf, 0.0)[None]
                kinds.append((logits + bias).softmax(-1) @ v[item - 1])
            gate = torch.zeros(n, 1, dtype=q.dtype)
            gate[text:, 0] = target.to(q.dtype)
            outs.append(gate * kinds[0] + (1 - gate) * kinds[1])
        return torch.stack(outs)

    def mask(self, a: Tensor, text: int, weights: Tensor) -> Tensor:
        """bool [video tokens] of one item."""
        g = a[text:, :text] @ weights
        if self.both_regions:
            g = (g + weights @ a[:text, text:]) / 2
        g = g.view(self.length // (self.model.config.patch_size_t or 1), -1)
        inside = []
        for frame in g:
            inside.append((frame - frame.min()) / (frame.max() - frame.min() + 1e-6) >= 0.3)
        return torch.cat(inside)

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """SDE-DPM-Solver++ 2M over the long latent; two draws a step but for the first, of which the first is thrown
        away.
        """
        previous, h_before = None, None
        for step, t in enumerate(self.timesteps):
            x0 = self.x0(x, step)
            if step == len(self.timesteps) - 1:
                return x0
            a, b = self.alphas[t].double(), self.alphas[self.timesteps[step + 1]].double()
            h = 0.5 * torch.log(b / (1 - b)) - 0.5 * torch.log(a / (1 - a))
            d = x0
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            if previous is not None:
                r = h_before / h
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            keep = ((1 - b) / (1 - a)).sqrt() * torch.exp(-h)
            x = keep * x + (1 - torch.exp(-2 * h)) * b.sqrt() * d + ((1 - b) * (1 - torch.exp(-2 * h))).sqrt() * noise
            previous, h_before = x0, h
        raise AssertionError
