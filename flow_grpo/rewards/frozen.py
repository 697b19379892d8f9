"""What all scorers with a network share: frozen weights, in float32 or bfloat16, here or in main memory.

Published weights that are no transformers model are one file of tensors; it is read without running what is pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.models.files import LOADING_ERRORS
from flow_grpo.paths import find

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REASON_LENGTH = 200  # characters quoted of a library's complaint


class FrozenNetwork:
    """A network in eval mode; gradient flows through it to the images, never to the weights.

    Autocast is switched off inside, so a score does not depend on the precision of the code around it.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        device: torch.device | str = "cpu",
        *,
        dtype: str = "fp32",
        offload: bool = False,
        exact: Sequence[str] = (),
    ) -> None:
        """Take a network over.

        Args:
            network: what is loaded; it is changed in place.
            device: where it works.
            dtype: "fp32" or "bf16", of its weights; pixels, unit features and scores are float32 at least.
            offload: its weights stay in main memory, and are on the device only while they are used.
            exact: names of parameters that stay float32, such as the one number that multiplies every score.
        """
        self.device, self.offload = torch.device(device), offload
        kept = {name: network.get_parameter(name).detach().float() for name in exact}
        network.to(DTYPES[dtype])
        for name, value in kept.items():
            network.get_parameter(name).data = value
        self.model: Any = network.to("cpu" if offload else self.device).eval().requires_grad_(False)

    @contextmanager
    def weights_here(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """The weights on the device; yields their dtype, and that of what goes in and comes out, float32 at least."""
        dtype = max(self.model.parameters(), key=Tensor.numel).dtype
        copies = copied_to(self.model, self.device) if self.offload else nullcontext()
        with torch.autocast(self.device.type, enabled=False), copies:
            yield dtype, torch.promote_types(dtype, torch.float32)


@contextmanager
def copied_to(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the module has copies of its weights, on a device; after it, those it had.

    A graph that was made inside keeps the copies it needs until its backward pass.
    """
    tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    places: list[tuple[Any, dict[str, Tensor | None]]] = [(table, dict(table)) for table in tables]
    held = {tensor for _, own in places for tensor in own.values() if tensor is not None}
    copies = {tensor: tensor.detach().to(device, copy=True) for tensor in held}
    for values, own in places:
        values.update({name: copies[tensor] for name, tensor in own.items() if tensor is not None})
    try:
        yield
    finally:
        for values, own in places:
            values.update(own)


# --- loading ----------------------------------------------------------------------------------------------


@contextmanager
def loading(model: str, kind: str) -> Iterator[None]:
    """What libraries say of a model that they cannot load becomes one sentence, a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (*LOADING_ERRORS, LookupError) as error:
        reason = one_line(str(error), REASON_LENGTH) or type(error).__name__
        raise ConfigError(f"{model!r} cannot be loaded as {kind}: {reason}") from error


def load_whole(kind: Any, model: str, name: str) -> Any:
    """A transformers model of this class from a folder or hub id.

    Raises ConfigError for weights that lack a part: the library would fill it with random numbers and only warn.
    """
    network, info = kind.from_pretrained(find(model), output_loading_info=True)
    if info["missing_keys"]:
        raise ConfigError(
            f"{model!r} is not a whole {name} checkpoint; it lacks {', '.join(sorted(info['missing_keys']))}."
        )
    return network


def weights_file(model: str, names: Sequence[str]) -> Path:
    """The file of weights of a folder, the first that is there, or of a hub id, which has the first.

    Raises ConfigError for a folder without any.
    """
    folder = Path(find(model))
    if not folder.is_dir():
        return Path(hf_hub_download(model, names[0]))
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{model!r} has no {' or '.join(names)}.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a .safetensors or from a file of torch.save, of which nothing but tensors is let in.

    Of a checkpoint that keeps its weights under "state_dict" or "model", these are taken.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        found = found.get(name, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{path} does not hold tensors by name.")
    return found


def fill(network: torch.nn.Module, weights: Mapping[str, Tensor], model: str) -> None:
    """Give a network its weights; ConfigError unless they are just those that it has."""
    missing, unexpected = network.load_state_dict(dict(weights), strict=False)
    for verb, names in (("lacks", missing), ("has a stray", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"the file of weights of {model!r} {verb} {', '.join(sorted(names)[:3])}{more}.")
