"""DiTCtrl's editing modes written out literally: one forward of [u_s, u_t, c_s, c_t], whole matrices, no code of the
project.

Follows the authors' attention classes (dit_video_concat.py, KVSharingAdaLNMixin and ReWeightAdaLNMixin).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import JointCalls, patched_attention


@dataclass
class EditLoop:
    """`shared` says at which (step, layer) the targets read keys and values of their sources. `tokens` are the text
    positions whose probabilities are multiplied by `factor` in the targets, in both regions between text and video.
    """

    model: torch.nn.Module
    shared: object
    tokens: tuple[int, ...] = ()
    factor: float = 1.0
    rotary: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, source: Tensor, target: Tensor, t: int, step: int) -> Tensor:
        """The four outputs; `x` [1, F, C, H, W] is the same for all."""
        text, zero = source.shape[1], torch.zeros_like(source)
        grid = x.shape[1] * (x.shape[-1] // 2) * (x.shape[-2] // 2)
        calls = JointCalls(len(self.model.transformer_blocks), text + grid)

        def edited(plain, q, k, v, **rest):
            at = calls.next(q)
            if at is None:
                return plain(q, k, v, **rest)
            outs = []
            for item in range(4):
                target = item in (1, 3)
                lender = item - 1 if target and self.shared(step, at[1]) else item
                p = (q[item] @ k[lender].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
                if target:
                    for token in self.tokens:
                        p[:, text:, token] *= self.factor
                        p[:, token, text:] *= self.factor
                outs.append(p @ v[lender])
            return torch.stack(outs)

        batch = torch.cat([x] * 4)
        with torch.no_grad(), patched_attention(edited):
            both = torch.cat([zero, zero, source, target])
            return self.model(batch, both, torch.full((4,), t), image_rotary_emb=self.rotary, return_dict=False)[0]
