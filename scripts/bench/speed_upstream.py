"""GRPO in the order of calls that Flow-GRPO's own loop has: what an epoch of the same algorithm costs there.

Its code cannot be run here: it starts wandb, reads data that is not part of it, and knows no other model than SD3.5. So
its calls were read (github.com/yifan123/flow_grpo, scripts/train_sd3.py, commit 74db691) and are made anew, of
diffusers' own network: one sampler and one training loop, in eager mode.

- Prompts are embedded for each batch, and each as often as it stands there; the empty prompt once.
- A guided forward is of both halves at once, in the rollout and at each trained step.
- An image whose advantage is 0 is left out; a KL penalty evaluates the base weights at each trained step.
- Its recipes train 9 of 10 steps (a `timestep_fraction` of .99, rounded down). Here as many are trained as the
  configuration says, so that both sides do the same.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.sd3_sde_with_logprob import step_log_prob, step_mean
from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.policy import Policy

Embeds = tuple[Tensor, Tensor]  # of every token, and the pooled ones


class Upstream:
    """GRPO on these prompts, one for each image; equal ones next to each other are a group."""

    def __init__(self, policy: Policy, reward: Any, prompts: list[str]) -> None:
        self.policy, self.reward, self.prompts = policy, reward, prompts
        self.sample, self.train = policy.settings.config.sample, policy.settings.config.train
        self.levels = policy.sigmas(self.sample.num_steps).tolist()
        pairs = itertools.pairwise(self.levels)
        self.steps = [step_coefficients(self.sample.sde_type, *pair, self.sample.noise_level) for pair in pairs]
        self.guided = self.sample.guidance_scale != 1
        with torch.no_grad():
            self.nothing = self._embedded([""])

    def epoch(self) -> None:
        """Sample, score, and train all updates of an epoch."""
        *kept, rewards = self._sampled()
        groups = rewards.view(-1, self.sample.num_image_per_prompt)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        advantages = advantages.flatten().clamp(-self.train.adv_clip_max, self.train.adv_clip_max)
        order = torch.randperm(len(self.prompts))
        order = order[advantages[order] != 0]
        for update in order.chunk(self.train.updates_per_epoch):
            self._update(update, kept, advantages)

    # --- the network -------------------------------------------------------------------------------------

    def _embedded(self, texts: list[str]) -> Embeds:
        found = self.policy.pipeline.encode_prompt(
            texts, None, None, device=self.policy.device, do_classifier_free_guidance=False,
            max_sequence_length=self.policy.settings.config.max_sequence_length,
        )  # fmt: skip
        return found[0], found[2]

    def _with_negatives(self, embeds: Embeds) -> Embeds:
        if not self.guided:
            return embeds
        both = zip(self.nothing, embeds, strict=True)
        tokens, pooled = (torch.cat([one.expand(len(other), *one.shape[1:]), other]) for one, other in both)
        return tokens, pooled

    def _velocity(self, x: Tensor, sigma: float, embeds: Embeds) -> Tensor:
        latents = torch.cat([x, x]) if self.guided else x
        v: Tensor = self.policy.transformer(
            hidden_states=latents, timestep=torch.full((len(latents),), 1000 * sigma), encoder_hidden_states=embeds[0],
            pooled_projections=embeds[1], return_dict=False,
        )[0]  # fmt: skip
        if not self.guided:
            return v
        without, conditional = v.chunk(2)
        return without + self.sample.guidance_scale * (conditional - without)

    # --- sampling and training ---------------------------------------------------------------------------

    @torch.no_grad()
    def _sampled(self) -> list[Tensor]:
        """Embeddings, states, log-probabilities and rewards of all images."""
        parts = []
        for start in range(0, len(self.prompts), self.sample.batch_size):
            texts = self.prompts[start : start + self.sample.batch_size]
            embeds = self._embedded(texts)
            states, log_probs = self._rollout(embeds)
            rewards = self.reward(self.policy.decode(states[:, -1]), texts, [{} for _ in texts]).total
            parts.append((*embeds, states, log_probs, rewards))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _rollout(self, embeds: Embeds) -> tuple[Tensor, Tensor]:
        x = torch.randn(len(embeds[0]), *self.policy.latent_shape)
        states, log_probs, both = [x], [], self._with_negatives(embeds)
        for sigma, step in zip(self.levels, self.steps, strict=False):  # there is a last level without a step
            mean = step_mean(x, self._velocity(x, sigma, both), step)
            x = mean + step.s * torch.randn_like(mean)
            states.append(x)
            log_probs.append(step_log_prob(x, mean, step.s, self.sample.sde_type))
        return torch.stack(states, 1), torch.stack(log_probs, 1)

    def _update(self, update: Tensor, kept: list[Tensor], advantages: Tensor) -> None:
        policy, trained = self.policy, max(1, int(self.train.timestep_fraction * self.sample.num_steps))
        for chunk in update.split(self.train.batch_size):
            tokens, pooled, states, old = (part[chunk] for part in kept)
            embeds = self._with_negatives((tokens, pooled))
            for step in range(trained):
                loss = self._loss(step, states, old, embeds, advantages[chunk])
                policy.accelerator.backward(len(chunk) / len(update) / trained * loss)
        torch.nn.utils.clip_grad_norm_(policy.trainable, self.train.max_grad_norm)
        policy.optimizer.step()
        policy.optimizer.zero_grad()
        if policy.ema is not None:
            policy.ema.step(policy.trainable)

    def _loss(self, step: int, states: Tensor, old: Tensor, embeds: Embeds, advantages: Tensor) -> Tensor:
        x, sigma, coefficients = states[:, step], self.levels[step], self.steps[step]
        mean = step_mean(x, self._velocity(x, sigma, embeds), coefficients)
        log_prob = step_log_prob(states[:, step + 1], mean, coefficients.s, self.sample.sde_type)
        ratio = (log_prob - old[:, step]).exp()
        clipped = ratio.clamp(1 - self.train.clip_range, 1 + self.train.clip_range)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if self.train.beta > 0:
            with torch.no_grad(), self.policy._adapter_disabled():
                base = step_mean(x, self._velocity(x, sigma, embeds), coefficients)
            loss = loss + self.train.beta * ((mean - base) ** 2).mean() / (2 * coefficients.s**2)
        return loss
