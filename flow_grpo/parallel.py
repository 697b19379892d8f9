"""How processes hold the transformer's weights: all of them on each, or on each a part of every one (FSDP2).

`Replicated`: gradients are averaged once per update, in one reduction. `Sharded` (`config.sharding = "full"`): the
weights of a block are gathered while it runs, forward or backward, and every backward pass averages its gradients. What
training keeps besides (gradients, moments, averaged and old weights) is of a process's own parts, as plain tensors.

A sharded network waits for all processes in every forward and backward: each must run as many, in the same order, so
one that has no image left runs a stand-in that counts for nothing (`ImageModel.stand_in`, `loops.collect.in_step`),
and what is decided by a process's own numbers is decided by all (`ImageModel.agreed`).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class Weights(Protocol):
    """The trained weights of a transformer, as this process holds them."""

    named: dict[str, nn.Parameter]  # what this process holds of each, by the transformer's names

    def average(self, loss: Tensor) -> Tensor:
        """Collective: make `grad` of `named` the gradient's mean over processes, zero where there is none.

        Returns:
            the mean over processes of the scalar `loss`.
        """

    def clip(self, limit: float) -> Tensor:
        """Collective: scale the gradient to a norm of at most `limit`; its norm before that, over all weights."""

    def shape(self, name: str) -> torch.Size:
        """Of the whole weight."""

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a tensor of that weight's shape."""

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """Collective: of a tensor of which each process holds a `part`, all, on the main process's CPU; None elsewhere.

        It may be the given tensor itself.
        """


class Replicated:
    """Every process holds every weight."""

    def __init__(self, transformer: nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}

    def average(self, loss: Tensor) -> Tensor:
        """In one reduction, with the loss."""
        parameters = list(self.named.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.accelerator.num_processes > 1:
            flat = torch.cat([loss.reshape(1).to(grads[0].dtype), *(grad.flatten() for grad in grads)])
            flat = self.accelerator.reduce(flat, reduction="mean")
            torch.nn.utils.vector_to_parameters(flat[1:], grads)
            loss = flat[0]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return loss

    def clip(self, limit: float) -> Tensor:
        """By accelerate, which in fp16 first divides by the loss scale."""
        return cast("Tensor", self.accelerator.clip_grad_norm_(list(self.named.values()), limit))

    def shape(self, name: str) -> torch.Size:
        """Its own."""
        return self.named[name].shape

    def part(self, name: str, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """The main process's; nothing is sent."""
        return part.detach().cpu() if self.accelerator.is_main_process else None


class Sharded:
    """Each process holds equal slices of every weight's first dimension; the last ones may be shorter, or empty.

    `named` are plain views of what FSDP2 gathers from, so that what is written to them is what the network computes
    with. Only frozen weights may differ in dtype.
    """

    def __init__(self, transformer: nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.mesh = shard(transformer, accelerator)
        # FSDP2 looks at dtypes, and at what is trained, when it first gathers: now, while the LoRA is on. Only then is
        # it settled which memory it gathers from.
        for module in transformer.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()
        trained = {name: cast("Any", p) for name, p in transformer.named_parameters() if p.requires_grad}
        self._shards: dict[str, DTensor] = trained
        with torch.no_grad():
            self.named = {name: nn.Parameter(value.to_local()) for name, value in self._shards.items()}

    @torch.no_grad()
    def average(self, loss: Tensor) -> Tensor:
        """FSDP2 has averaged the gradients in the backward passes; the loss is left."""
        for name, parameter in self.named.items():
            grad = cast("DTensor | None", self._shards[name].grad)
            parameter.grad = torch.zeros_like(parameter) if grad is None else grad.to_local()
            self._shards[name].grad = None
        return cast("Tensor", self.accelerator.reduce(loss, reduction="mean"))

    def clip(self, limit: float) -> Tensor:
        """The squares of the parts' norms add up."""
        own = get_total_norm([parameter.grad for parameter in self.named.values() if parameter.grad is not None])
        norm = cast("Tensor", self.accelerator.reduce(own.square(), reduction="sum")).sqrt()
        clip_grads_with_norm_(self.named.values(), limit, norm)
        return norm

    def shape(self, name: str) -> torch.Size:
        """Of all parts together."""
        return self._shards[name].shape

    def part(self, name: str, whole: Tensor) -> Tensor:
        """A slice."""
        size = -(-len(whole) // self.mesh.size())  # as FSDP2 cuts
        return whole[size * self.mesh.get_local_rank() :][:size]

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """One tensor is gathered at a time, on every process."""
        like = self._shards[name]
        parts = DTensor.from_local(
            part.detach().to(self.accelerator.device), self.mesh, (Shard(0),), shape=like.shape, stride=like.stride()
        )
        full = parts.full_tensor()
        return full.cpu() if self.accelerator.is_main_process else None


def blocks_of(transformer: Any) -> list[nn.Module]:
    """The blocks that a transformer is made of, as diffusers' classes name them."""
    kinds = transformer._no_split_modules or ()
    return [module for module in transformer.modules() if type(module).__name__ in kinds]


def shard(transformer: Any, accelerator: Accelerator) -> DeviceMesh:
    """Share a transformer's weights among all processes: block by block, then what is in none of them.

    From the CPU, a block at a time goes to the device, so that the whole need not fit there. The mesh is ours:
    accelerate's FSDP plugin shards in `prepare` alone, through which the transformer does not go, and accelerate 1.15
    ignores it on CPUs without a word.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in blocks_of(transformer):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # The rest, too, is given up after its forward: else it would outlive a change of the parts, as by averaged weights.
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)
    return mesh
