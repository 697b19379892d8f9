"""The guided velocity: the formula, its gradient, and the number of forwards."""

from functools import partial

import pytest
import torch

from flow_grpo.diffusers_patch.velocity import blended_velocity, guided_velocity
from flow_grpo.models.sd3 import SD3
from flow_grpo.types import PromptEmbeds


class Recorder(torch.nn.Module):
    """A transformer's stand-in: linear in the latents and the pooled prompt; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.calls = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        self.calls.append((len(hidden_states), timestep))
        return (self.weight * hidden_states * timestep.view(-1, 1, 1, 1) + pooled_projections.view(-1, 1, 1, 1),)


def embeds(value, batch=2):
    return PromptEmbeds(
        torch.zeros(batch, 3, 5, dtype=torch.float64), torch.full((batch, 1), value, dtype=torch.float64)
    )


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_guidance_is_uncond_plus_w_times_the_difference():
    v = guided_velocity(partial(SD3.velocity, Recorder()), X, 0.25, embeds(3.0), embeds(1.0), 4.5)
    torch.testing.assert_close(v, 0.7 * X * 250 + 1.0 + 4.5 * (3.0 - 1.0), rtol=1e-12, atol=1e-12)


def test_conditional_and_unconditional_are_not_exchanged():
    v = guided_velocity(partial(SD3.velocity, Recorder()), X, 0.25, embeds(3.0), embeds(1.0), 4.5)
    exchanged = guided_velocity(partial(SD3.velocity, Recorder()), X, 0.25, embeds(1.0), embeds(3.0), 4.5)
    assert (v - exchanged).abs().min() > 1


def test_guidance_one_is_a_single_forward_without_negative_prompts():
    model = Recorder()
    v = guided_velocity(partial(SD3.velocity, model), X, 0.25, embeds(3.0))
    assert [batch for batch, _ in model.calls] == [2]
    torch.testing.assert_close(
        v, guided_velocity(partial(SD3.velocity, Recorder()), X, 0.25, embeds(3.0), embeds(1.0), 1.0), rtol=0, atol=0
    )


def test_guidance_is_one_forward_of_both_halves():
    model = Recorder()
    guided_velocity(partial(SD3.velocity, model), X, 0.25, embeds(3.0), embeds(1.0), 4.5)
    assert [batch for batch, _ in model.calls] == [4]


def test_the_network_sees_a_thousand_sigma():
    model = Recorder()
    guided_velocity(partial(SD3.velocity, model), X, 0.25, embeds(3.0))
    assert model.calls[0][1].tolist() == [250.0, 250.0]


def test_gradient_flows_through_both_halves():
    model = Recorder()
    guided_velocity(partial(SD3.velocity, model), X, 0.25, embeds(3.0), embeds(1.0), 4.5).sum().backward()
    torch.testing.assert_close(model.weight.grad, 250 * X.sum(), rtol=1e-12, atol=0)


def test_guidance_without_negative_prompts_is_refused():
    with pytest.raises(ValueError, match=r"4\.5"):
        guided_velocity(partial(SD3.velocity, Recorder()), X, 0.25, embeds(3.0), None, 4.5)


def test_a_detached_unconditional_half_leaves_the_value_and_its_own_gradient_out():
    """v = u + w (c - u) with u, c linear in the weight: dv/dweight is w times that of c instead of the whole."""
    gradients, values = [], []
    for detach in (False, True):
        model = Recorder()
        arguments = (embeds(3.0), embeds(1.0), 4.5, detach)
        v = guided_velocity(partial(SD3.velocity, model), X, 0.25, *arguments)
        v.sum().backward()
        gradients.append(model.weight.grad.item())
        values.append(v)
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)
    assert gradients[1] == pytest.approx(4.5 * gradients[0], rel=1e-12)
    assert [batch for batch, _ in model.calls] == [2, 2]


# --- two velocities, blended -----------------------------------------------------------------------------


def tuned(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.sin(x) + sigma


def base(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x.square() - sigma


POINT = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("share", "of"), [(1.0, tuned), (0.0, base)])
def test_a_share_of_one_is_the_tuned_velocity_and_of_zero_the_base(share, of):
    assert torch.equal(blended_velocity(tuned, base, share, share)(POINT, 0.3), of(POINT, 0.3))


def test_half_is_the_mean():
    found = blended_velocity(tuned, base, 0.5, 0.5)(POINT, 0.3)
    torch.testing.assert_close(found, (tuned(POINT, 0.3) + base(POINT, 0.3)) / 2, rtol=1e-15, atol=0)


def test_the_share_is_linear_in_sigma_from_its_noisy_to_its_clean_end():
    blended = blended_velocity(tuned, base, 1.0, 0.2)
    assert torch.equal(blended(POINT, 1.0), tuned(POINT, 1.0))
    for sigma, share in ((0.0, 0.2), (0.25, 0.4), (0.5, 0.6)):
        expected = share * tuned(POINT, sigma) + (1 - share) * base(POINT, sigma)
        torch.testing.assert_close(blended(POINT, sigma), expected, rtol=1e-12, atol=1e-14)
    swapped = blended_velocity(tuned, base, 0.2, 1.0)
    assert not torch.allclose(swapped(POINT, 0.25), blended(POINT, 0.25))


def test_what_is_not_wanted_is_not_evaluated():
    def never(x, sigma):
        raise AssertionError

    assert blended_velocity(tuned, never, 1.0, 1.0) is tuned
    blended_velocity(never, base, 0.0, 0.0)(POINT, 0.5)
    blended_velocity(tuned, never, 1.0, 0.0)(POINT, 1.0)
