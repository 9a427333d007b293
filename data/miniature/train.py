"""Train the miniature's transformer and text encoder together, resumably, on clips drawn as it goes.

    python data/miniature/train.py --run runs/train --steps 4000              # on from the shipped weights
    python data/miniature/train.py --run runs/train --steps 30000 --scratch   # from nothing
    python data/miniature/train.py --run runs/train --steps 9000              # a longer plan for the same run
    python data/miniature/train.py --run runs/train --export data/miniature   # write the averaged weights

Three departures from a plain v-prediction loss, all stated in the model card: cells near an object weigh more,
half of the timesteps are drawn where an object takes shape, and word maps are taught where their object is.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import ground
import numpy as np
import torch
from clips import Batch, draw, join
from model import (
    FOLDER,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    export,
    load_vae,
    tokenize,
)
from torch import Tensor

EMPTY, ZERO = 0.075, 0.075  # shares of the two null conditions: empty caption, all-zero text embedding
GROUND_ROWS, GROUND_COLUMNS = 0.02, 0.01  # loss weights: text rows over video columns, and the reverse
FRESH_EVERY, FRESH = 8, 16  # every so many steps, so many new clips


def pick_timesteps(count: int, rng: torch.Generator) -> Tensor:
    """Stratified and shuffled: half over all 1000 timesteps, half between 600 and 900."""
    spread = (torch.arange(count) // 2 * 2 + 2 * torch.rand(count, generator=rng)) / count
    inner = torch.arange(count) % 2 == 1
    times = torch.where(inner, 600 + 300 * spread, 1000 * spread).long().clamp(0, 999)
    return times[torch.randperm(count, generator=rng)]


class Trainer:
    """Model, averaged weights, optimizers and random state of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.step = options, 0
        self.rng = torch.Generator().manual_seed(options.seed)
        self.tokenizer = build_tokenizer()
        self.text, self.video = build_text_encoder(len(self.tokenizer)), build_transformer()
        self.vae = load_vae(FOLDER / "vae")
        self.alphas = build_scheduler().alphas_cumprod.float()
        self.empty = tokenize(self.tokenizer, [""])
        self.kept: list[tuple[Tensor, Tensor]] = []
        for layer, block in enumerate(self.video.transformer_blocks):
            block.attn1.set_processor(ground.RecordingProcessor(self.kept if layer in ground.LAYERS else None))
        self._start()
        named = [*self.text.named_parameters(), *self.video.named_parameters()]
        matrices = [p for n, p in named if p.ndim == 2 and "transformer_blocks" in n and "norm" not in n]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self.weights = matrices + others
        self.averaged = [p.detach().clone() for p in self.weights]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=options.muon_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(others, lr=options.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [group["lr"] for one in self.optimizers for group in one.param_groups]
        self._resume()

    def _start(self) -> None:
        if self.options.init:
            state = torch.load(self.options.init)
            self.text.load_state_dict(state["te"])
            self.video.load_state_dict(state["tr"])
        elif not self.options.scratch:
            self.text.load_state_dict(type(self.text).from_pretrained(FOLDER / "text_encoder").state_dict())
            stored = type(self.video).from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32)
            self.video.load_state_dict(stored.state_dict())

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=False)
        for weight, stored in zip(self.weights + self.averaged, state["weights"] + state["averaged"], strict=True):
            weight.data.copy_(stored)
        for one, stored in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(stored)
        self.step = state["step"]
        self.rng.set_state(state["rng"])

    @property
    def checkpoint(self) -> Path:
        return Path(self.options.run) / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it."""
        state = {
            "weights": [weight.data for weight in self.weights],
            "averaged": self.averaged,
            "optimizers": [one.state_dict() for one in self.optimizers],
            "step": self.step,
            "rng": self.rng.get_state(),
        }
        torch.save(state, self.checkpoint.with_suffix(".fresh"))
        os.replace(self.checkpoint.with_suffix(".fresh"), self.checkpoint)

    def rate(self) -> float:
        """Warm up, hold, and fall linearly to zero over the last ``--decay`` of the steps."""
        left = (self.options.steps - self.step) / (self.options.decay * self.options.steps)
        return max(0.0, min(1.0, (self.step + 1) / 100, left))

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted v-prediction loss and the two grounding losses of one batch."""
        count = len(batch.ids)
        clean, times = batch.latents.float(), pick_timesteps(count, self.rng)
        noise = torch.randn(clean.shape, generator=self.rng)
        lucky = torch.rand(count, generator=self.rng)
        ids = torch.where((lucky < EMPTY)[:, None], self.empty, batch.ids)
        zero = (lucky >= EMPTY) & (lucky < EMPTY + ZERO)
        alpha = self.alphas[times].view(-1, 1, 1, 1, 1)
        noisy, target = (
            alpha.sqrt() * clean + (1 - alpha).sqrt() * noise,
            alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
        )
        self.kept.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = self.text(ids).last_hidden_state.masked_fill(zero[:, None, None], 0.0)
            guess = self.video(noisy, text, times, return_dict=False)[0]
        error = (batch.weight * (guess.float() - target) ** 2).mean((1, 2, 3, 4))
        error = (error * torch.where(times >= 950, 0.5, 1.0)).mean()
        use = (times < ground.BELOW) & (lucky >= EMPTY + ZERO)
        rows, columns = ground.grounding_losses(self.kept, batch, use)
        return error, rows, columns

    def update(self, batch: Batch) -> list[float]:
        error, rows, columns = self.losses(batch)
        (error + GROUND_ROWS * rows + GROUND_COLUMNS * columns).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        groups = [group for one in self.optimizers for group in one.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * self.rate()
        for one in self.optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.options.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averaged, [weight.data for weight in self.weights], 1 - keep)
        return [error.item(), rows.item(), columns.item()]

    def train(self) -> None:
        options = self.options
        rng = np.random.default_rng([options.seed, self.step])
        pool = join([draw(64, rng, self.vae, self.tokenizer, options.pair) for _ in range(options.pool // 64)])
        print(f"pool of {options.pool} clips", flush=True)
        place, recent, began = 0, [], time.time()
        while self.step < options.steps:
            if self.step % FRESH_EVERY == 0:
                spots = torch.arange(place, place + FRESH) % options.pool
                pool.put(spots, draw(FRESH, rng, self.vae, self.tokenizer, options.pair))
                place += FRESH
            index = torch.randint(options.pool, (options.batch,), generator=self.rng)
            recent.append(self.update(pool.at(index)))
            if self.step % 50 == 0:
                shown = " ".join(f"{value:.4f}" for value in np.mean(recent, 0))
                print(f"{self.step} {time.time() - began:.0f}s rate {self.rate():.3f} losses {shown}", flush=True)
                recent.clear()
            if self.step % 250 == 0 or self.step == options.steps:
                self.save()

    def export(self, folder: Path) -> None:
        for weight, stored in zip(self.weights, self.averaged, strict=True):
            weight.data.copy_(stored)
        export(self.video.state_dict(), self.text.state_dict(), self.vae, folder)


def main() -> None:
    """Train, or export what was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the whole run, resumed ones included")
    parser.add_argument("--scratch", action="store_true", help="start from random weights")
    parser.add_argument("--init", help="start from a saved {'te', 'tr'} state")
    parser.add_argument("--export", type=Path, help="write the averaged weights to this pipeline folder and stop")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pool", type=int, default=2048, help="clips held at a time")
    parser.add_argument("--pair", type=float, default=0.4, help="share of two-object clips")
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--adam-rate", type=float, default=6e-4)
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--decay", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    Path(options.run).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    trainer.export(options.export) if options.export else trainer.train()


if __name__ == "__main__":
    main()
