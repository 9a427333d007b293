"""What a model is, and the proof that its attention is read and rewritten exactly: the body of `mmdit check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from probe.models.load import Checkpoint, checkpoints_of
from probe.models.prove import Finding, prove
from probe.models.registry import family_of


def examine(model: str, device: str | None = None) -> list[Finding]:
    """One row that says what the model is, then the checks of `probe.prove`; the same for the second transformer of a
    pipeline that has two.

    `model` is "miniature", a pipeline or a bare transformer, as a folder or a hub id. Transformers are loaded one after
    the other, text encoders and autoencoder not at all.

    Raises:
        ModelError: not found, not loadable, or of an unknown family.
    """
    checkpoints = checkpoints_of(model)
    named = len(checkpoints) > 1
    return [
        replace(finding, check=f"{checkpoint.part} {finding.check}") if named else finding
        for checkpoint in checkpoints
        for finding in _examined(checkpoint, device)
    ]


def _examined(checkpoint: Checkpoint, device: str | None) -> list[Finding]:
    bare = checkpoint.load(device=device)
    return [Finding("family", True, described(bare.transformer)), *prove(bare)]


def described(transformer: Any) -> str:
    """Family, layers x heads x head width, how many attentions of each kind, parameters and dtype, as one sentence."""
    family = family_of(transformer)
    slots, config = family.slots(transformer), transformer.config
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(slot.kind for slot in slots).items())
    return (
        f"{family.name}: {1 + max(slot.layer for slot in slots)} layers x {config.num_attention_heads} heads x "
        f"{config.attention_head_dim} ({kinds} attention), {sum(p.numel() for p in transformer.parameters()):,} "
        f"parameters in {str(transformer.dtype).removeprefix('torch.')}"
    )
