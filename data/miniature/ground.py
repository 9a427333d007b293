"""The grounding loss: a word's attention map should lie where its object is.

B entries; N = 20 text + 320 video tokens; a pair is one word of one thing (its color, noun or direction).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from clips import Batch
from model import TEXT_LENGTH
from torch import Tensor

LAYERS = (1, 2, 3, 4)
BELOW = 900  # timesteps from here on are too noisy for an object to have a place
COLUMN_ENTRIES = 2  # batch entries on which the (dearer) video rows are computed


class RecordingProcessor:
    """CogVideoX joint attention (no rotary positions) that leaves its queries and keys [B, heads, N, d] in a list.

    Attention itself runs in float32: its bfloat16 backward is slower on a CPU.
    """

    def __init__(self, kept: list[tuple[Tensor, Tensor]] | None) -> None:
        self.kept = kept

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: None = None,
    ) -> tuple[Tensor, Tensor]:
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            layer(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if self.kept is not None:
            self.kept.append((query, key))
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        text = encoder_hidden_states.shape[1]
        return out[:, text:], out[:, :text]


def grounding_losses(kept: list[tuple[Tensor, Tensor]], batch: Batch, use: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of word maps against the place of their object: (of text rows, of video rows).

    A map is the mean over heads of the joint softmax, restricted to video tokens and made to sum to one.
    ``use`` [B] says which entries count. Each is a mean over layers, entries, things and words.
    """
    shown = (batch.shares.sum(-1) > 0) & use[:, None]  # [B, 2]
    few = slice(COLUMN_ENTRIES)
    rows = [_miss(*_rows(query, key, batch, shown)) for query, key in kept]
    columns = [_miss(*_columns(query[few], key[few], batch, shown[few])) for query, key in kept]
    return torch.stack(rows).mean(), torch.stack(columns).mean()


def _miss(logs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over pairs, zero when there are none: a mean of nothing is not a number."""
    return -(targets * logs.log_softmax(-1)).sum() / max(1, len(logs))


def _rows(query: Tensor, key: Tensor, batch: Batch, shown: Tensor) -> tuple[Tensor, Tensor]:
    count, heads, _, width = query.shape
    place = batch.words.reshape(count, 1, 6, 1).expand(-1, heads, -1, width)
    logits = query.gather(2, place).float() @ key.float().transpose(-1, -2) / width**0.5
    maps = logits.softmax(-1).mean(1)[..., TEXT_LENGTH:]  # [B, 6, N_video]
    return _pairs(maps, batch.shares, shown)


def _columns(query: Tensor, key: Tensor, batch: Batch, shown: Tensor) -> tuple[Tensor, Tensor]:
    count, heads, _, width = query.shape
    logits = query[:, :, TEXT_LENGTH:].float() @ key.float().transpose(-1, -2) / width**0.5
    place = batch.words[:count].reshape(count, 1, 1, 6).expand(-1, heads, logits.shape[2], -1)
    seen = (logits.gather(3, place) - logits.logsumexp(-1, keepdim=True)).exp()
    return _pairs(seen.mean(1).transpose(1, 2), batch.shares[:count], shown)


def _pairs(maps: Tensor, shares: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Log maps and target shares of the things that count: each [pairs, N_video]."""
    logs = (maps + 1e-8).log().unflatten(1, (2, 3))  # [B, thing, word, N_video]
    targets = shares[:, :, None].expand_as(logs)
    return logs[shown].flatten(0, 1), targets[shown].flatten(0, 1)
