"""Bytes that the phases of an epoch take, beyond the weights: by the package's own code, on tensors without data.

`LiveBytes` sums the storages that are alive after every operation. Under torch's FakeTensorMode no storage has data, so
a model of any size is counted on one core. What is counted is what the package itself runs, of one image:

- encoding: the text encoders of transformers on a prompt of the longest length, one after another;
- sampling: one step of `pipeline_with_logprob` (each more adds its latents, at most a MiB);
- decoding and scoring: `policy.decode` and PickScore; with gradient, as `Objective.image_gradient` has it;
- training: GRPO's `step_loss` of one step, and its backward pass. DRTune's two-pass runs the same network once with a
  gradient at a time, from a given gradient at its velocity, so this phase is the same there;
- update: AdamW in torch's default form on GPUs (foreach), then the average's step.

Fake tensors are on the CPU, as autograd asks a GPU's driver for its streams. The one rule of CUDA's autocast that
changes what these networks keep is added to the CPU's: layer_norm computes in float32 (`cuda_autocast`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.likelihood_ratio import RatioKeys, likelihood_of
from flow_grpo.loops.policy_gradient import Minibatch, step_loss
from flow_grpo.policy import Policy
from flow_grpo.rewards.clip import PickScore
from flow_grpo.types import Trajectory
from scripts.bench.memory_models import Model

SAMPLED, TRAINED = torch.tensor((1.0, 0.0)), torch.tensor((1.0, 0.5, 0.0))  # noise levels


Meter = Callable[[Callable[[], Any]], int]  # work -> the most bytes it takes beyond what was there


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors made inside the block that are alive, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the storages of what the operation gives, but for those that it was given: they were there before."""
        for storage in self._new((args, kwargs)):
            self._seen.add(storage)
        result = function(*args, **(kwargs or {}))
        for storage in self._new(result):
            size = storage.nbytes()
            self._seen.add(storage)
            self.live += size
            weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.live)
        return result

    def _new(self, values: Any) -> list[Any]:
        storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in _tensors(values))}
        return [storage for storage in storages.values() if storage not in self._seen]

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those in nested tuples, lists and dictionaries; torch's own pytree takes most of the time otherwise."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def counted(work: Callable[[], Any]) -> int:
    """The most bytes that `work` has alive at once, beyond what there was before it."""
    with LiveBytes() as bytes_:
        work()
    return bytes_.peak


def measured(work: Callable[[], Any]) -> int:
    """The same of the GPU, by its allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held(tensors: Any) -> int:
    """The bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- tensors without data -------------------------------------------------------------------------------------


class DataStays(TorchFunctionMode):
    """Tensors that have data, such as noise levels and masks, are computed with as usual until they meet one without.

    So code that reads a number of theirs goes on.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """With data alone: for real."""
        tensors = list(_tensors((args, kwargs)))
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module._apply` does, which cannot swap fake tensors in place."""
    changed: dict[nn.Parameter, nn.Parameter] = {}  # a weight may have several places
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if parameter not in changed:
                changed[parameter] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
            part._parameters[name] = changed[parameter]
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else change(buffer)
    return module


@contextmanager
def without_data() -> Iterator[None]:
    """Tensors made inside have none; `.to` of modules works."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch("flow_grpo.rewards.towers.check_images"))  # it reads pixels
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(DataStays())
        yield


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """CPU's autocast computes layer_norm in float32, as CUDA's does."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def layer_norm(
        x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: bool = True
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            weight, bias = (None if value is None else value.float() for value in (weight, bias))
            return torch.layer_norm(x.float(), shape, weight, bias, eps)

    library = torch.library.Library("aten", "IMPL")
    library.impl("layer_norm", layer_norm, "AutocastCPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def real_or_not(real: bool) -> AbstractContextManager[Any]:
    """Nothing for tensors with data; else `without_data` and `cuda_autocast`."""
    stack = ExitStack()
    if not real:
        stack.enter_context(without_data())
        stack.enter_context(cuda_autocast())
    return stack


class OneProcess:
    """As much of accelerate's `Accelerator` as a policy asks for."""

    num_processes, process_index, is_main_process, scaler = 1, 0, True, None

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision

    def autocast(self) -> AbstractContextManager[Any]:
        """As `mixed_precision` says."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def prepare(self, optimizer: Any) -> Any:
        """As it is."""
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Plain."""
        loss.backward()


# --- phases ---------------------------------------------------------------------------------------------------


def encoding(encoder: nn.Module, tokens: int, hidden_states: bool) -> Callable[[], Any]:
    """A prompt of so many tokens through one text encoder."""
    device = next(encoder.parameters()).device

    def work() -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        with torch.no_grad():
            return encoder(input_ids=ids, output_hidden_states=hidden_states)

    return work


def sampling(policy: Policy) -> Callable[[], Any]:
    """One step of the rollout of one image."""
    sample = policy.settings.config.sample

    def work() -> None:
        generators = [torch.Generator().manual_seed(0)]
        velocity = policy.velocity(policy.encode([""]), sample.guidance_scale)
        noise = torch.zeros(1, *policy.latent_shape, device=policy.device)
        with torch.no_grad():
            pipeline_with_logprob(
                velocity, noise, SAMPLED, sde_type=sample.sde_type, noise_level=sample.noise_level, window=[0],
                generators=generators,
            )  # fmt: skip

    return work


def decoding(policy: Policy, reward: PickScore, gradient: bool) -> Callable[[], Any]:
    """One image decoded and scored; with the gradient of the score at its latents."""

    def work() -> None:
        latents = torch.zeros(1, *policy.latent_shape, device=policy.device, requires_grad=gradient)
        with torch.set_grad_enabled(gradient):
            scores = reward(policy.decode(latents), [""], [{}])
        if gradient:
            torch.autograd.grad(scores.sum(), latents)

    return work


def training(policy: Policy) -> Callable[[], Any]:
    """One image and one step of GRPO, and the backward pass."""
    config = policy.settings.config
    device = policy.device

    def work() -> None:
        latents = torch.zeros(1, 3, *policy.latent_shape, device=device)
        trajectory = Trajectory(latents, TRAINED, (0,), latents[:, :1], torch.zeros(1, 1, device=device))
        embeds = policy.encode([""])
        velocity = policy.velocity(embeds, config.sample.guidance_scale)
        reference = policy.reference_velocity(embeds, config.sample.guidance_scale) if config.train.beta > 0 else None
        minibatch = Minibatch(
            velocity, reference, likelihood_of(config), RatioKeys(0, 0, 0, (0,)), trajectory,
            advantages=torch.zeros(1, device=device), old_log_probs=torch.zeros(1, 1, device=device),
        )  # fmt: skip
        policy.accelerator.backward(step_loss(minibatch, 0, config)["loss"])

    return work


def updating(policy: Policy) -> Callable[[], Any]:
    """AdamW's step, and the average's; there must be moments and gradients."""

    def work() -> None:
        policy.optimizer.step()
        if policy.ema is not None:
            policy.ema.step(policy.trainable)

    return work


def policy_of(family: Any, config: Any, device: torch.device) -> Policy:
    """Of a configuration, on one process; the settings are those that a policy reads, unchecked."""
    settings: Any = SimpleNamespace(config=config, image_size=(config.resolution,) * 2, total_updates=1)
    accelerator: Any = OneProcess(device, config.mixed_precision)
    return Policy(family, settings, accelerator)


def held_by(policy: Policy) -> dict[str, int]:
    """Bytes of what stays from phase to phase."""
    trained, vae = held(policy.trainable), sum(parameter.numel() for parameter in policy.vae.parameters())
    return {
        "transformer": held(policy.transformer.parameters()),
        "gathered": gathered(policy.transformer),
        "gradients": trained,
        "moments": 2 * trained,
        "average": 0 if policy.ema is None else held(policy.ema.shadow_params),
        "vae_fp32": 4 * vae,
        "vae_bf16": 2 * vae,
    }


def of_scoring(policy: Policy, reward: PickScore, meter: Meter) -> dict[str, int]:
    """What decoding and scoring takes beyond the weights, by the VAE's dtype."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        policy.vae.to(dtype)
        found[f"decoding_{name}"] = meter(decoding(policy, reward, gradient=False))
        found[f"decoding_gradient_{name}"] = meter(decoding(policy, reward, gradient=True))
    return found


def of_training(policy: Policy, meter: Meter, plain: bool) -> dict[str, int]:
    """What the other phases take beyond weights, gradients, moments and averages, which are all there by then.

    Args:
        plain: count training without gradient checkpointing, too.
    """
    found = {"sampling": meter(sampling(policy))}
    for group in policy.optimizer.param_groups:
        group["foreach"] = True  # as on GPUs
    for parameter in policy.trainable:
        parameter.grad = torch.zeros_like(parameter)
    policy.optimizer.step()
    policy.transformer.train()
    policy.transformer.enable_gradient_checkpointing()
    found["training"] = meter(training(policy))
    if plain:
        policy.transformer.disable_gradient_checkpointing()
        found["training_plain"] = meter(training(policy))
    found["updating"] = meter(updating(policy))
    return found


def of_text(model: Model, device: torch.device, meter: Meter) -> dict[str, int]:
    """The text encoders' weights, in bf16, and what the hungriest takes besides."""
    weights, extra = 0, []
    for build, tokens in model.text_encoders:
        encoder = build().to(device, torch.bfloat16).eval()
        weights += held(encoder.parameters())
        extra.append(meter(encoding(encoder, tokens, model.hidden_states)))
    return {"weights": weights, "encoding": max(extra)}


def gathered(transformer: Any) -> int:
    """Bytes that `sharding = "full"` gathers at once: what is in no block, and two blocks, one of them ahead."""
    units = transformer._no_split_modules or ()
    blocks = [held(module.parameters()) for module in transformer.modules() if type(module).__name__ in units]
    return held(transformer.parameters()) - sum(blocks) + 2 * max(blocks)
