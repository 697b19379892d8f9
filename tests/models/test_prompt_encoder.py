"""Text encoders that are off the GPU between uses: how often they move, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from flow_grpo.models.prompt_encoder import PromptEncoder
from tests.conftest import by_method
from tests.training.saving import weights

PROMPTS = ["a bag", "a red coat", "a bag", "a boot"]


@pytest.fixture
def moves(monkeypatch):
    """Where text encoders were sent, one entry for each move of each."""
    sent = []
    move = PromptEncoder._move

    def recorded(self, device):
        sent.append(str(device))
        move(self, device)

    monkeypatch.setattr(PromptEncoder, "_move", recorded)
    return sent


def encoder(policy, offload=True, kept=8):
    return PromptEncoder(
        policy.family, policy.device, max_sequence_length=8, dtype=torch.float32, kept=kept, offload=offload
    )


def test_embeddings_are_the_same_bits_with_and_without(config, build):
    policy = build(config).policy
    here, away = (encoder(policy, offload)(PROMPTS) for offload in (False, True))
    assert torch.equal(here.prompt_embeds, away.prompt_embeds)
    assert torch.equal(here.pooled_prompt_embeds, away.pooled_prompt_embeds)


def test_encoders_come_once_for_all_prompts_that_are_embedded_ahead(config, build, moves):
    encode = encoder(build(config).policy)
    encode.ahead(PROMPTS)
    assert moves == ["cpu", "cpu"]  # to the device, which is the CPU here, and back
    encode(PROMPTS)
    encode.ahead(PROMPTS)
    assert len(moves) == 2


def test_a_prompt_that_was_not_embedded_ahead_is_embedded_all_the_same(config, build, moves):
    encode = encoder(build(config).policy)
    encode(["a bag"])
    assert len(moves) == 2
    encode(["a bag", "a boot"])
    assert len(moves) == 4


def test_without_it_encoders_never_move(config, build, moves):
    encode = encoder(build(config).policy, offload=False)
    encode.ahead(PROMPTS)
    encode(PROMPTS)
    assert moves == []


@pytest.mark.parametrize("method", ["grpo", "drtune", "nft"])
def test_an_epoch_moves_the_encoders_once_and_trains_to_the_same_weights(config, build, moves, method):
    by_method(config, method)
    config.sample.guidance_scale, ends = 3.0, []
    for offload in (False, True):
        config.pretrained.offload_text, config.run_name = offload, f"offload-{offload}"
        parts = build(config)
        parts.train()
        ends.append(weights(parts))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert len(moves) == 2
