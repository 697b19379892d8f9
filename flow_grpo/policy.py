"""The model that is fine-tuned: which weights are trained, with their optimizer, average, base and prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from torch import Tensor

from flow_grpo.compilation import TOKENS, Compiled, batch_sizes, is_compiled
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.diffusers_patch.velocity import VelocityFn, blended_velocity, guided_velocity
from flow_grpo.errors import ConfigError
from flow_grpo.messages import say
from flow_grpo.methods.registry import method_of
from flow_grpo.models.base import ModelFamily
from flow_grpo.models.loading import DTYPES, load_model
from flow_grpo.models.lora_places import check_lora_targets
from flow_grpo.models.loras import merge_lora
from flow_grpo.models.prompt_encoder import PromptEncoder
from flow_grpo.optimizers import make_optimizer
from flow_grpo.parallel import Replicated, Sharded, Weights, shard
from flow_grpo.paths import find
from flow_grpo.prompts import own_negatives
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.chosen import constraint_rates
from flow_grpo.schedule import learning_rates
from flow_grpo.settings import Settings
from flow_grpo.types import BaseImages, PromptEmbeds, Trajectory

UNGUIDED = 1.0  # a guidance scale

T = TypeVar("T")


def load_pretrained(settings: Settings) -> ModelFamily:
    """`config.pretrained`, in the precision of the run; ConfigError as `load_model` and `load_lora`."""
    pretrained = settings.config.pretrained
    family = load_model(pretrained, settings.config.mixed_precision)
    if pretrained.lora:
        loaded = merge_lora(family.transformer, find(pretrained.lora))
        say(f"pretrained.lora, {loaded.name}: {loaded}")
    return family


class ImageModel:
    """A model that makes images as a configuration says: all that an evaluation needs of it. Nothing in it trains.

    Attributes:
        family: what is the model's own.
        pipeline, transformer, vae: diffusers' pipeline, and the modules themselves.
        network_evaluations: transformer forwards times latents so far, on this process; both halves of a guided
            forward count.
        trained_evaluations: those of them that kept a graph for a backward pass.
        sharded: whether every forward waits for all processes, each of which holds a part of the weights.
    """

    sharded = False

    def __init__(self, family: ModelFamily, settings: Settings, accelerator: Accelerator) -> None:
        self.settings, self.accelerator, self.device = settings, accelerator, accelerator.device
        self.family = family
        self.pipeline = family.pipeline
        offload = settings.config.pretrained.offload_text
        for name, part in self.pipeline.components.items():
            away = (self.sharded and name == "transformer") or (offload and name.startswith("text_encoder"))
            if isinstance(part, torch.nn.Module) and not away:
                part.to(self.device)  # a sharded transformer goes there in parts
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer, self.vae = family.transformer, family.vae
        if settings.config.pretrained.vae_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.network_evaluations = self.trained_evaluations = 0
        self._reference: torch.nn.Module | None = (
            None  # the pretrained transformer, where it is not this one's LoRA off
        )
        self._compiled: Compiled | None = None
        self._precision = ""  # of autocast, where it is not the run's
        self._freeze()
        self._negatives = own_negatives(settings.config)
        self._encoder = PromptEncoder(
            family,
            self.device,
            max_sequence_length=settings.config.max_sequence_length,
            dtype=DTYPES[settings.config.mixed_precision],
            kept=settings.config.prompt_cache_size,
            offload=offload,
            multiple=TOKENS if is_compiled(settings) else 1,
        )

    def _freeze(self) -> None:
        """No module trains, and none has dropout on."""
        for module in self.pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()

    def eager(self) -> AbstractContextManager[None]:
        """Where the network is differentiated in another way than by one backward pass: nothing compiled runs."""
        return nullcontext() if self._compiled is None else self._compiled.eager()

    # --- processes ---------------------------------------------------------------------------------------

    def stand_in(self, items: Sequence[T]) -> Sequence[T]:
        """What a process that has none of the items runs the network on, for nothing: one, or none if it may wait."""
        return items[:1] if self.sharded else items[:0]

    def agreed(self, fine: bool) -> bool:
        """Whether all processes are fine, if the network waits for all of them; else whether this one is."""
        if not self.sharded:
            return fine
        answers = self.accelerator.gather(torch.tensor([int(fine)], device=self.device))
        return bool(answers.all())

    # --- prompts, velocity, images -----------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embed prompts, each distinct one once: B of them -> (B, L, E), (B, P), and their negative prompts' texts."""
        return replace(self._encoder(prompts), negatives=tuple(map(self._negative_of, prompts)))

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Embed prompts, and their negative ones, that are about to be needed, all at once."""
        self._encoder.ahead([*prompts, *map(self._negative_of, prompts)])

    def _negative_of(self, prompt: str) -> str:
        return self._negatives.get(prompt, self.settings.config.negative_prompt)

    def velocity(self, embeds: PromptEmbeds, guidance_scale: float, detach_unconditional: bool = False) -> VelocityFn:
        """The guided velocity v(x, sigma) of these prompts: (B, C, h, w) -> (B, C, h, w), float32."""
        return self._velocity_of(self.transformer, embeds, guidance_scale, detach_unconditional)

    def _velocity_of(
        self,
        transformer: torch.nn.Module,
        embeds: PromptEmbeds,
        guidance_scale: float,
        detach_unconditional: bool = False,
    ) -> VelocityFn:
        guided = guidance_scale != 1.0
        negative = self.encode(embeds.negatives) if guided else None
        network = partial(self.family.velocity, transformer)

        def velocity(latents: Tensor, sigma: float) -> Tensor:
            count = len(latents) * (2 if guided else 1)
            self.network_evaluations += count
            if torch.is_grad_enabled():
                self.trained_evaluations += len(latents) if detach_unconditional else count
            with self._autocast():
                return guided_velocity(
                    network, latents, sigma, embeds, negative, guidance_scale, detach_unconditional, self.family.guide
                )

        return velocity

    @contextmanager
    def in_precision(self, precision: str) -> Iterator[None]:
        """Inside, the network computes by autocast in "bf16"; "": as the run does. Velocities stay float32."""
        before, self._precision = self._precision, precision
        try:
            yield
        finally:
            self._precision = before

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision:
            return torch.autocast(self.device.type, DTYPES[self._precision])
        return self.accelerator.autocast()

    def sigmas(self, num_steps: int) -> Tensor:
        """Noise levels of a sampler of `num_steps` steps, by the pipeline's own scheduler: (num_steps + 1,)."""
        return self.family.sigmas(num_steps, *self.settings.image_size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image's latents."""
        return self.family.latent_shape(*self.settings.image_size)

    def noise(self, generators: list[torch.Generator]) -> Tensor:
        """x_1 of one image per generator: (B, C, h, w) float32, drawn on the CPU."""
        shape = len(generators), *self.latent_shape
        return randn_tensor(shape, generator=generators, device=self.device, dtype=torch.float32)

    def sample_ode(self, prompts: Sequence[str], generators: list[torch.Generator]) -> Trajectory:
        """Evaluation's sampler: the ODE at `config.eval`'s steps, guidance and share of the tuned velocity."""
        evaluation, embeds = self.settings.config.eval, self.encode(prompts)
        velocity = self.velocity(embeds, evaluation.guidance_scale)
        if self.has_adapters or self._reference is not None:  # else nothing is tuned
            base = self.reference_velocity(embeds, evaluation.guidance_scale)
            velocity = blended_velocity(velocity, base, *evaluation.tuned_share)
        return pipeline_with_logprob(velocity, self.noise(generators), self.sigmas(evaluation.num_steps))

    def replace_transformer(self, transformer: torch.nn.Module) -> None:
        """Draw with a fully fine-tuned one; the base is kept where velocities of both are blended."""
        if tuple(self.settings.config.eval.tuned_share) != (1.0, 1.0):
            self._reference = self.transformer
        self.transformer = transformer.to(self.device).requires_grad_(False).eval()
        self.pipeline.transformer = self.transformer

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32, differentiable."""
        return self.family.decode(latents)

    # --- the pretrained weights -------------------------------------------------------------------------

    def reference_velocity(self, embeds: PromptEmbeds, guidance_scale: float) -> VelocityFn:
        """`velocity` under the pretrained weights, without gradient."""
        module = self.transformer if self._reference is None else self._reference
        velocity = self._velocity_of(module, embeds, guidance_scale)

        def reference(latents: Tensor, sigma: float) -> Tensor:
            with torch.no_grad(), self._adapter_disabled():
                return velocity(latents, sigma)

        return reference

    def sample_base(self, prompts: Sequence[str], generators: list[torch.Generator], num_steps: int) -> Tensor:
        """Images of the pretrained weights' own law, by the ODE without guidance: x_0, (B, C, h, w)."""
        velocity = self.reference_velocity(self.encode(prompts), UNGUIDED)
        return pipeline_with_logprob(velocity, self.noise(generators), self.sigmas(num_steps)).final_latents

    def reference_product(
        self, embeds: PromptEmbeds, guidance_scale: float
    ) -> Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]]:
        """(x, sigma, a) -> (v, J^T a), J = dv/dx under the pretrained weights, each (B, C, h, w), without graph."""
        module = self.transformer if self._reference is None else self._reference
        velocity = self._velocity_of(module, embeds, guidance_scale)

        def product(latents: Tensor, sigma: float, cotangent: Tensor) -> tuple[Tensor, Tensor]:
            # the backward pass inside, too: gradient checkpointing runs the network again there
            with torch.enable_grad(), self._adapter_disabled():
                x = latents.detach().requires_grad_()
                v = velocity(x, sigma)
                (pulled,) = torch.autograd.grad(v, x, cotangent.to(v.dtype))
            return v.detach(), pulled

        return product

    @property
    def has_adapters(self) -> bool:
        """Whether the transformer has any LoRA."""
        return bool(self.transformer._hf_peft_config_loaded)

    @contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        """Switch LoRA off; nothing to do for a frozen copy, or where there is none."""
        if self._reference is not None or not self.has_adapters:
            yield
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()


class Policy(ImageModel):
    """Everything of the model that the two training loops and the evaluation need.

    Weights that are trained are float32; all others are frozen, in the dtype of `mixed_precision`.

    Attributes:
        weights: how the processes hold the transformer's weights.
        trainable, named_trainable: what this process holds of the trained parameters, in a fixed order; by their names.
        optimizer: `train.optimizer` on them, prepared by accelerate.
        learning_rate: that of the update which so many were applied before.
        ema: `diffusers.training_utils.EMAModel` of them, or None.
        base_images: what the forward KL holds the weights to; None: not drawn, or not asked for.
        old: older values of the trained parameters, kept by methods that compare with them; None: none are.
        skipped_in_a_row: updates skipped since the last that was applied.
    """

    def __init__(self, family: ModelFamily, settings: Settings, accelerator: Accelerator) -> None:
        self.sharded = settings.config.sharding == "full" and accelerator.num_processes > 1
        super().__init__(family, settings, accelerator)
        config = settings.config
        self.skipped_in_a_row = 0
        self.old: list[Tensor] | None = None
        self.base_images: BaseImages | None = None
        if config.use_lora:
            self._add_lora()
        else:
            blended = tuple(config.eval.tuned_share) != (1.0, 1.0)
            drawn = config.eval_forward_kl or config.train.forward_kl > 0
            drawn = drawn or bool(constraint_rates(config))
            keep_reference = config.train.beta > 0 or blended or drawn or method_of(config).needs_base
            self._train_everything(keep_reference)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if is_compiled(settings):
            held = (self.transformer, self._reference)
            self._compiled = Compiled([module for module in held if module is not None], batch_sizes(settings))
        if self.sharded and self._reference is not None:
            shard(self._reference, accelerator)
        self.weights: Weights = (Sharded if self.sharded else Replicated)(self.transformer, accelerator)
        self.named_trainable = self.weights.named
        self.trainable = list(self.named_trainable.values())
        self.optimizer = accelerator.prepare(make_optimizer(self.trainable, config.train, self.device.type))
        self.learning_rate = learning_rates(settings)
        self.ema = EMAModel(self.trainable, decay=config.train.ema_decay) if config.train.ema else None

    @classmethod
    def load(cls, settings: Settings, accelerator: Accelerator) -> Policy:
        """Load the pretrained model and make its policy."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.config.allow_tf32
        return cls(load_pretrained(settings), settings, accelerator)

    # --- construction --------------------------------------------------------------------------------

    def _add_lora(self) -> None:
        """LoRA (arXiv 2106.09685) on the transformer; Gaussian A, zero B, the same on every process."""
        lora = self.settings.config.lora
        check_lora_targets((name for name, _ in self.transformer.named_modules()), lora.target_modules)
        adapter = LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # as peft writes it
            init_lora_weights="gaussian",
            target_modules=list(lora.target_modules),
            exclude_modules=list(self.family.modules_without_effect()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.settings.config.seed, "lora").initial_seed())
            try:
                self.transformer.add_adapter(adapter)
            except ValueError as error:  # peft's word for modules that it cannot adapt, or that are all left out
                raise ConfigError(f"config.lora.target_modules = {tuple(lora.target_modules)}: {error}") from error
        cast_training_params(self.transformer, torch.float32)

    def _train_everything(self, keep_reference: bool) -> None:
        """Full fine-tuning; the KL divergences, and a blend of velocities, then need a frozen copy."""
        self.transformer.float()  # `to` would warn of modules that are to stay float32
        if keep_reference:
            self._reference = copy.deepcopy(self.transformer)
        self.transformer.requires_grad_(True)

    # --- averaged weights --------------------------------------------------------------------------------

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Use the averaged weights inside the block. Without an average, the current ones."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trainable)
        self.ema.copy_to(self.trainable)
        try:
            yield
        finally:
            self.ema.restore(self.trainable)

    # --- old weights ---------------------------------------------------------------------------------------

    def keep_old(self) -> None:
        """Keep the present weights as the old ones, unless there are older ones."""
        if self.old is None:
            self.old = [parameter.detach().clone() for parameter in self.trainable]

    @torch.no_grad()
    def move_old(self, decay: float) -> None:
        """old <- decay old + (1 - decay) current; there must be old ones."""
        assert self.old is not None, "keep_old comes first"
        for old, parameter in zip(self.old, self.trainable, strict=True):
            old.mul_(decay).add_(parameter, alpha=1 - decay)

    @contextmanager
    def old_weights(self) -> Iterator[None]:
        """Use the old weights inside the block; no gradient may be taken there.

        Nothing is copied, except where the weights are sharded: those are gathered from a fixed place.
        """
        assert self.old is not None, "keep_old comes first"
        current = [parameter.data.clone() if self.sharded else parameter.data for parameter in self.trainable]
        self._set_trainable(self.old)
        try:
            yield
        finally:
            self._set_trainable(current)

    def _set_trainable(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.trainable, values, strict=True):
            if self.sharded:
                parameter.data.copy_(value)
            else:
                parameter.data = value

    def old_velocity(self, embeds: PromptEmbeds, guidance_scale: float) -> VelocityFn:
        """`velocity` under the old weights, without gradient."""
        velocity = self.velocity(embeds, guidance_scale)

        def old(latents: Tensor, sigma: float) -> Tensor:
            with torch.no_grad(), self.old_weights():
                return velocity(latents, sigma)

        return old
