"""Guidance by a perturbed pass: away from what the model predicts when its attention is disturbed. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control.strength import Strength, strength_at
from probe.errors import UsageError
from probe.site import Branch, Span, chosen


@dataclass(frozen=True)
class Guide:
    """Adds w (eps_c - eps_p) to the guided prediction, eps_p that of a perturbed conditional pass:
    eps_u + g (eps_c - eps_u) + w (eps_c - eps_p), or eps_c + w (eps_c - eps_p) without classifier-free guidance.

    The perturbation itself is any edit with `where=Where(branches=Which(role=role))`: identity maps (PAG), mean queries
    (SEG), a skipped block (SLG, STG). `weight` is a number or a function of progress; in steps where it is 0, or that
    `steps` leaves out, there is no perturbed pass and no bit changes. `prompts` are the prompts guided, None for all.
    Several guides add up; two of one role share its pass. One more clip forward per prompt and step.

    Source: perturbed-attention guidance (Ahn et al. 2024).

    Raises:
        UsageError: the role is that of unperturbed branches.
    """

    weight: Strength
    role: str = "perturbed"
    steps: Span = None
    prompts: Span = None

    def __post_init__(self) -> None:
        if self.role == "plain":
            raise UsageError(
                "A Guide must have a role of its own, for its edits to find the perturbed pass. Got 'plain', the role "
                "of every other branch. Name it 'perturbed'."
            )

    def weights(self, step: int, steps: int, prompts: int) -> dict[int, float]:
        """The weight of each prompt guided at a step of `steps`; those of weight 0 are left out.

        Raises:
            UsageError: a step or prompt that the run does not have.
        """
        weight = strength_at(self.weight, step, steps) if step in chosen(self.steps, steps) else 0.0
        return {prompt: weight for prompt in chosen(self.prompts, prompts) if weight}


def passes(guides: Sequence[Guide], shown: Sequence[Branch], step: int, steps: int) -> dict[tuple[str, int], float]:
    """The perturbed clips of a step: the weight of each by its role and the place of its plain one in `shown`. Guides
    of one role share a pass; where they cancel there is none.

    Raises:
        UsageError: a step or prompt that the run does not have.
    """
    total: dict[tuple[str, int], float] = {}
    for one in guides:
        weights = one.weights(step, steps, max(branch.prompt for branch in shown) + 1)
        for row, branch in enumerate(shown):
            if branch.prompt in weights:
                total[one.role, row] = total.get((one.role, row), 0.0) + weights[branch.prompt]
    return {entry: weight for entry, weight in total.items() if weight}
