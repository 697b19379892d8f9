"""The data that flows through the package, with a shape on every field.

B images in a batch, T sampler steps, W stochastic steps, (C, h, w) a latent, (3, H, W) an image,
L prompt tokens, E embedding width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """The text conditioning of a transformer for a batch of prompts."""

    prompt_embeds: Tensor  # (B, L, E)
    pooled_prompt_embeds: Tensor | None = None  # (B, P), of families that take one
    mask: Tensor | None = None  # (B, L) bool, of families whose prompts differ in length: which tokens are a prompt's
    negatives: tuple[str, ...] = ()  # the negative prompt of each, which guidance leads away from; (): not said

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: Any) -> PromptEmbeds:
        """Select prompts by slice, list or index tensor."""
        rows = torch.arange(len(self))[index].tolist() if self.negatives else ()
        negatives = tuple(self.negatives[row] for row in rows)
        embeds, pooled, mask = (None if value is None else value[index] for value in self._values())
        return PromptEmbeds(embeds, pooled, mask, negatives)  # type: ignore[arg-type]

    def _values(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.prompt_embeds, self.pooled_prompt_embeds, self.mask

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> PromptEmbeds:
        """The same numbers in another precision, or elsewhere."""
        pooled, mask = self.pooled_prompt_embeds, self.mask
        return replace(
            self,
            prompt_embeds=self.prompt_embeds.to(device=device, dtype=dtype),
            pooled_prompt_embeds=None if pooled is None else pooled.to(device=device, dtype=dtype),
            mask=None if mask is None else mask.to(device=device),
        )

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Concatenate along the batch; what has a mask is padded to the longest."""
        if parts[0].mask is not None:
            length = max(part.prompt_embeds.shape[1] for part in parts)
            parts = [part._padded(length) for part in parts]
        columns = zip(*(part._values() for part in parts), strict=True)
        negatives = tuple(negative for part in parts for negative in part.negatives)
        embeds, pooled, mask = (None if column[0] is None else torch.cat(column) for column in columns)
        return PromptEmbeds(embeds, pooled, mask, negatives)  # type: ignore[arg-type]

    def padded(self, multiple: int) -> PromptEmbeds:
        """The same prompts, of a length that is a multiple of so many tokens; as it is where there is no mask."""
        length = self.prompt_embeds.shape[1]
        return self._padded(length + -length % multiple)

    def _padded(self, length: int) -> PromptEmbeds:
        missing = length - self.prompt_embeds.shape[1]
        if not missing or self.mask is None:
            return self
        pad = torch.nn.functional.pad
        return replace(
            self, prompt_embeds=pad(self.prompt_embeds, (0, 0, 0, missing)), mask=pad(self.mask, (0, missing))
        )


@dataclass(frozen=True)
class Trajectory:
    """One rollout of the sampler, in float32, and what GRPO needs of it."""

    latents: Tensor  # (B, T + 1, C, h, w): x at sigmas[0], ..., sigmas[T]
    sigmas: Tensor  # (T + 1,), decreasing to 0
    stochastic_steps: tuple[int, ...]  # the W step indices that drew noise, ascending
    means: Tensor | None  # (B, W, C, h, w): a x + b v of each stochastic step; None: nobody asked for them
    log_probs: Tensor  # (B, W): log-density of each stochastic step, averaged over the C h w dimensions

    @property
    def final_latents(self) -> Tensor:
        """x_0, (B, C, h, w)."""
        return self.latents[:, -1]

    def __getitem__(self, index: Any) -> Trajectory:
        """Select images by slice, list or index tensor."""
        means = None if self.means is None else self.means[index]
        return replace(self, latents=self.latents[index], means=means, log_probs=self.log_probs[index])

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Concatenate the images of rollouts that took the same steps, and all kept their means or none did."""
        means = [part.means for part in parts if part.means is not None]
        return replace(
            parts[0],
            latents=torch.cat([part.latents for part in parts]),
            means=torch.cat(means) if means else None,
            log_probs=torch.cat([part.log_probs for part in parts]),
        )


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of a batch of images: the weighted sum that is optimised, and each of its terms."""

    total: Tensor  # (B,) float32
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (B,) float32, unweighted


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of the images that one process makes in one epoch, in order."""

    prompts: tuple[str, ...]  # one per image
    metadata: tuple[Mapping[str, Any], ...]  # one per image; {} for .txt datasets
    sample_ids: Tensor  # (N,) int64: position in the epoch, over all processes; keys the noise
    group_ids: Tensor  # (N,) int64: sample_ids // group size; images of one group share their prompt

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class BaseImages:
    """N images of the pretrained model, as latents."""

    prompts: tuple[str, ...]  # one per image
    latents: Tensor  # (N, C, h, w) float32, on the CPU


@dataclass(frozen=True)
class Samples:
    """The images of one evaluation, shared by all evaluators; exactly those asked for, in order of (prompt, sample)."""

    images: Tensor  # (N, 3, H, W) float32 in [0, 1], on the CPU
    latents: Tensor  # (N, C, h, w) float32, on the CPU
    prompts: tuple[str, ...]  # one per image
    metadata: tuple[Mapping[str, Any], ...]  # one per image
    prompt_ids: Tensor  # (N,) int64: index among the evaluated prompts
    sample_ids: Tensor  # (N,) int64: index among the images of its prompt
    label: str = "eval"  # what is measured on them is logged as <label>/<metric>

    def __getitem__(self, index: Sequence[int]) -> Samples:
        """Select images by a list of positions."""
        rows = list(index)
        return replace(
            self,
            images=self.images[rows],
            latents=self.latents[rows],
            prompts=tuple(self.prompts[i] for i in rows),
            metadata=tuple(self.metadata[i] for i in rows),
            prompt_ids=self.prompt_ids[rows],
            sample_ids=self.sample_ids[rows],
        )
