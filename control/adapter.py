"""What the denoising loop needs of a pipeline: encode, forward, advance, decode. CogVideoX so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from control.schedule import refuse_steps
from probe.errors import ModelError, UsageError
from probe.models.cogvideox import clip_frames, padding_frames

SamplerName = Literal["model", "ddim", "dpm"]
NoiseName = Literal["shared", "each"]
SEED_LIMIT = 2**63


class Loop:
    """The parts of a CogVideoX pipeline around its transformer, for a loop of our own.

    `sampler`: "model" keeps the pipeline's scheduler, "ddim" and "dpm" (SDE-DPM-Solver++ 2M) build CogVideoX's own
    from its configuration. Latents are [P, F, C, H, W]: prompts, latent frames, channels, latent pixels.

    `noise`: "shared" gives all prompts the same random numbers, at the start and in the steps of a stochastic sampler,
    so that prompts alone make the difference; "each" draws for every prompt, as the stock pipeline does for a batch.

    Raises:
        UsageError: steps that the scheduler cannot take (it finds the previous timestep as t - 1000 // steps), or a
            seed out of range.
        ModelError: a pipeline without a loop adapter.
    """

    def __init__(
        self, pipe: Any, steps: int, seed: int, sampler: SamplerName = "model", noise: NoiseName = "shared"
    ) -> None:
        if type(pipe).__name__ != "CogVideoXPipeline":
            raise ModelError(
                f"A loop of our own must run on CogVideoX so far. Got {type(pipe).__name__}. Use probe.trace, which "
                "runs the stock pipeline."
            )
        self.pipe, self.steps, self.shared = pipe, steps, noise == "shared"
        self.scheduler = _scheduler(pipe, sampler)
        refuse_steps(steps, self.scheduler.config.num_train_timesteps)
        if not 0 <= seed < SEED_LIMIT:
            raise UsageError(f"A seed must lie in 0 to 2^63 - 1. Got {seed}. Choose another.")
        self.scheduler.set_timesteps(steps, device=self.device)
        self.timesteps: list[int] = [int(t) for t in self.scheduler.timesteps]
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def device(self) -> torch.device:
        """Where the transformer computes (offloaded pipelines included)."""
        return self.pipe._execution_device

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self.pipe.transformer.config

    @property
    def clip_frames(self) -> int:
        """Latent frames of one clip as the model was trained."""
        return clip_frames(self.config)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [P, T, E], padded as the model was trained."""
        length = self.config.max_text_seq_length
        return self.pipe.encode_prompt(list(prompts), None, False, max_sequence_length=length, device=self.device)[0]

    def noise(self, batch: int, frames: int, dtype: torch.dtype) -> Tensor:
        """Noise [batch, frames, C, H, W] to start from, drawn on the CPU from the seed: the same on every device."""
        from diffusers.utils.torch_utils import randn_tensor

        config = self.config
        shape = (batch, frames, config.in_channels, config.sample_height, config.sample_width)
        latents = randn_tensor(shape, generator=self._generators(batch), device=self.device, dtype=dtype)
        return latents * self.scheduler.init_noise_sigma

    def forward(self, latents: Tensor, text: Tensor, step: int) -> Tensor:
        """One transformer forward, float32 [B, F, C, H, W]."""
        transformer = self.pipe.transformer
        timestep = self.scheduler.timesteps[step].expand(len(latents))
        latents = self.scheduler.scale_model_input(latents, self.scheduler.timesteps[step])
        with transformer.cache_context("cond_uncond"):
            output = transformer(
                hidden_states=latents.to(text.dtype),
                encoder_hidden_states=text,
                timestep=timestep,
                image_rotary_emb=self._rotary(latents.shape[1]),
                return_dict=False,
            )[0]
        return output.float() if output.dtype != torch.float64 else output

    def advance(
        self, output: Tensor, latents: Tensor, previous_x0: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor | None]:
        """One scheduler step: the next latents, and x0 if the sampler remembers it."""
        timestep = self.scheduler.timesteps[step]
        if not _is_dpm(self.scheduler):
            return self.scheduler.step(output, timestep, latents, eta=0.0, return_dict=False)[0], None
        back = self.scheduler.timesteps[step - 1] if step else None
        arguments = (output, previous_x0, timestep, back, latents)
        return self.scheduler.step(*arguments, eta=0.0, generator=self._generators(len(latents)), return_dict=False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Pixel frames [B, 4 (F - 1) + 1, H, W, 3]; latent frames that only fill up the first token frame (1.5) are not
        shown.

        The decoder takes an odd number of latent frames; for an even one the last is repeated and the surplus cut, so
        that none is lost.
        """
        latents = latents[:, padding_frames(self.config) :]
        frames = latents.shape[1]
        if frames % 2 == 0:
            latents = torch.cat([latents, latents[:, -1:]], 1)
        video = self.pipe.decode_latents(latents.to(self.pipe.vae.dtype))
        pixels = self.pipe.video_processor.postprocess_video(video=video, output_type="np")
        wanted = self.pipe.vae_scale_factor_temporal * (frames - 1) + 1
        return (pixels[:, :wanted] * 255).round().astype(np.uint8)

    def sigma(self, step: int) -> float:
        """Noise level of a step, sqrt(1 - alpha_bar), 1 at the start of a zero-SNR schedule."""
        return float((1 - self.scheduler.alphas_cumprod[self.timesteps[step]]).sqrt())

    def close(self) -> None:
        """Hand offloaded parts back to where they were, as the stock call does at its end."""
        self.pipe.maybe_free_model_hooks()

    def _generators(self, batch: int) -> Any:
        """What draws for a batch: one generator for all, or one for each, all in the same state."""
        if not self.shared:
            return self.generator
        return [*(self.generator.clone_state() for _ in range(batch - 1)), self.generator]

    def _rotary(self, frames: int) -> tuple[Tensor, Tensor] | None:
        """Local positions: each segment counts its own frames."""
        if not self.config.use_rotary_positional_embeddings:
            return None
        scale = self.pipe.vae_scale_factor_spatial
        height, width = self.config.sample_height * scale, self.config.sample_width * scale
        return self.pipe._prepare_rotary_positional_embeddings(height, width, frames, self.device)


def _is_dpm(scheduler: Any) -> bool:
    return type(scheduler).__name__ == "CogVideoXDPMScheduler"


def _scheduler(pipe: Any, sampler: SamplerName) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    classes = {"model": type(pipe.scheduler), "ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
    return classes[sampler].from_config(pipe.scheduler.config)
