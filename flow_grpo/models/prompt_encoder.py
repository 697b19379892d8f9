"""Prompts to embeddings: each once, and the text encoders off the GPU while they have nothing to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch

from flow_grpo.models.base import ModelFamily
from flow_grpo.types import PromptEmbeds


class PromptEncoder:
    """Embeds prompts one by one, so that a prompt's embedding does not depend on those beside it, and keeps them.

    Args:
        family: whose text encoders they are.
        device: where they work, and where the embeddings are wanted.
        max_sequence_length: tokens of a prompt.
        dtype: of the embeddings.
        kept: prompts whose embeddings are kept.
        offload: between uses the encoders, and always the embeddings that are kept, are in main memory.
        multiple: of tokens, to which prompts with a mask are padded.
    """

    def __init__(
        self,
        family: ModelFamily,
        device: torch.device,
        *,
        max_sequence_length: int,
        dtype: torch.dtype,
        kept: int,
        offload: bool,
        multiple: int = 1,
    ) -> None:
        self._family, self._device, self._offload = family, device, offload
        self._max_sequence_length, self._dtype, self._multiple = max_sequence_length, dtype, multiple
        self._here, self._inside = not offload, False
        self._encode_one = lru_cache(maxsize=kept)(self._encode_uncached)
        for encoder in self._encoders() if offload else ():
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Of B prompts, on the device."""
        return PromptEmbeds.cat([self._encode_one(prompt) for prompt in prompts]).to(device=self._device)

    def ahead(self, prompts: Sequence[str]) -> None:
        """Embed prompts that will be needed: the encoders come once for all that are not known, or not at all."""
        if not self._offload:
            return  # each is embedded when it is needed
        with self._encoders_here():
            for prompt in dict.fromkeys(prompts):
                self._encode_one(prompt)

    def _encoders(self) -> list[torch.nn.Module]:
        parts = self._family.pipeline.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and part is not None]

    @torch.no_grad()
    def _encode_uncached(self, prompt: str) -> PromptEmbeds:
        with self._encoders_here():
            self._bring()
            embeds = self._family.encode(prompt, self._max_sequence_length).to(self._dtype).padded(self._multiple)
        return embeds.to(device=torch.device("cpu")) if self._offload else embeds

    @contextmanager
    def _encoders_here(self) -> Iterator[None]:
        """The outermost of these blocks sends the encoders back, if one inside has brought them."""
        inner, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = inner
            if not inner and self._offload and self._here:
                self._move("cpu")

    def _bring(self) -> None:
        if not self._here:
            self._move(self._device)

    def _move(self, device: torch.device | str) -> None:
        for encoder in self._encoders():
            encoder.to(device)
        self._here = not self._here
