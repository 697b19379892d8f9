"""FLUX rotates queries and keys in float32: what that costs in float64, said in docs/models.md."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers import transformer_flux, transformer_flux2

from flow_grpo.entropy import DivergenceEstimator, divergence
from flow_grpo.models.flux import Flux
from flow_grpo.models.flux2_klein import Flux2Klein
from tests.models.families import CASES


def rotate(x, cos_and_sin, sequence_dim):
    """The same rotation as diffusers' in the dtype of x: pairs (a, b) -> (a cos - b sin, b cos + a sin)."""
    assert sequence_dim == 1
    cos, sin = (value[None, :, None, :].to(x.dtype) for value in cos_and_sin)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


@pytest.mark.parametrize(("name", "family"), [("flux", Flux), ("flux2_klein", Flux2Klein)])
def test_float32_rotation_costs_the_divergence_less_than_1e_9(monkeypatch, name, family):
    model = family(next(case for case in CASES if case.name == name).build(), 3.5)
    model.transformer.double().requires_grad_(False)
    with torch.no_grad():
        embeds = model.encode("a red coat", 8)
    pooled = embeds.pooled_prompt_embeds
    embeds = replace(
        embeds,
        prompt_embeds=embeds.prompt_embeds.double(),
        pooled_prompt_embeds=None if pooled is None else pooled.double(),
    )
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, *model.latent_shape(16, 16), generator=draw, dtype=torch.float64)

    def velocity(latents, sigma):
        return model.velocity(model.transformer, latents, sigma, embeds)

    stock = divergence(velocity, x, 0.4, DivergenceEstimator(exact=True))
    for module in (transformer_flux, transformer_flux2):
        monkeypatch.setattr(module, "apply_rotary_emb", rotate)
    exact = divergence(velocity, x, 0.4, DivergenceEstimator(exact=True))
    torch.testing.assert_close(stock.mean, exact.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(stock.velocity, exact.velocity, rtol=0, atol=1e-8 * exact.velocity.abs().max().item())
    assert (stock.velocity != exact.velocity).any()  # the rotation is what was exchanged
