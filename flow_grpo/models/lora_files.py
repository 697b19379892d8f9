"""The LoRA files that other trainers write, and what they hold; which layers they mean is models/lora_places.py.

Read are names, shapes and settings alone: no torch is imported, and nothing is ever unpickled. A file's keys may be

    diffusers        transformer.transformer_blocks.0.attn.to_q.lora_A.weight, ....lora.down.weight
    peft             base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight, beside an adapter_config.json
    kohya            lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight, with .alpha, also lora_transformer_...
    ai-toolkit       diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight

A layer adds scale B A to a weight W; with DoRA (arXiv 2402.09353) W' = m (W + scale B A) / |W + scale B A|, row by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flow_grpo.errors import ConfigError
from flow_grpo.files import open_regular, parse_json, read_object
from flow_grpo.models.files import first_line

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
METADATA = "lora_adapter_metadata"  # in the header of diffusers' files: peft's settings, as "transformer.r"
FORMATS = (
    "diffusers (transformer.*.lora_A.weight), peft (base_model.model.*), kohya (lora_unet_*, lora_transformer_*) and "
    "ai-toolkit (diffusion_model.*)"
)
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "eva_residual")  # of init_lora_weights: W itself was changed

# --- keys -----------------------------------------------------------------------------------------------

PARTS = (  # the end of a key, after its layer's name, and what it is; peft may put an adapter's name in between
    ("A", re.compile(r"(?:\.lora_A(?:\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$")),
    ("B", re.compile(r"(?:\.lora_B(?:\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$")),
    ("bias", re.compile(r"\.lora_B(?:\.\w+)?\.bias$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("magnitude", re.compile(r"(?:\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?|\.dora_scale)$")),
)
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """One layer of a file."""

    name: str  # as the file has it
    keys: Mapping[str, str]  # part -> key
    shapes: Mapping[str, tuple[int, ...]]  # part -> shape

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.shapes["A"][0]


@dataclass(frozen=True)
class LoraFile:
    """What a file holds, its tensors unread."""

    path: Path
    layers: tuple[Layer, ...]
    strays: tuple[str, ...]  # keys that belong to no LoRA layer
    settings: Mapping[str, Any]  # peft's, as its adapter_config.json has them; {}: none


# --- reading --------------------------------------------------------------------------------------------


def lora_path(path: Path) -> Path | None:
    """The weights that a file or folder of a LoRA holds; None: it is none, as far as names tell.

    Raises:
        ConfigError: there are weights, but pickled.
    """
    if path.is_dir():
        for name in (PEFT_FILE, DIFFUSERS_FILE) if (path / PEFT_CONFIG).exists() else (DIFFUSERS_FILE,):
            if (path / name).exists():
                return path / name
        others = list(path.glob("*.safetensors"))
        if len(others) == 1 and _holds_lora(others[0]):
            return others[0]
        pickled = [path / f"{Path(name).stem}.bin" for name in (PEFT_FILE, DIFFUSERS_FILE)]
        path = next((file for file in pickled if file.exists()), path)
    if path.suffix in PICKLES:
        raise ConfigError(
            f"{path} is a pickle, which can run anybody's code when it is read; save the LoRA as .safetensors."
        )
    return path if path.suffix == ".safetensors" else None


def _holds_lora(path: Path) -> bool:
    """Whether a file of another name has a LoRA's matrices; a damaged one has not."""
    try:
        return any(_split(key)[1] in ("A", "B") for key in read_header(path)[0])
    except ConfigError:
        return False


def read_lora(path: Path) -> LoraFile:
    """The names, shapes and settings in a LoRA's file or folder.

    Raises:
        ConfigError: it is no LoRA, or one that is damaged, pickled, or of a kind that B A does not describe.
    """
    file = lora_path(path)
    if file is None:
        names = f"{PEFT_CONFIG} with {PEFT_FILE}, or {DIFFUSERS_FILE}"
        raise ConfigError(f"{path} is no LoRA; it takes a .safetensors file, or a folder with {names}.")
    shapes, metadata = read_header(file)
    found: dict[str, dict[str, str]] = {}
    strays = []
    for key in shapes:
        name, part = _split(key)
        if part in found.get(name, {}):
            raise ConfigError(f"{file} has two adapters: {found[name][part]} and {key}; save one alone.")
        if part:
            found.setdefault(name, {})[part] = key
        else:
            strays.append(key)
    if not any({"A", "B"} & parts.keys() for parts in found.values()):
        first = f"its first key is {next(iter(shapes))!r}" if shapes else "it is empty"
        raise ConfigError(f"{file} holds no LoRA layer ({first}); known are the keys of {FORMATS}.")
    layers = [Layer(name, keys, {part: shapes[key] for part, key in keys.items()}) for name, keys in found.items()]
    for layer in layers:
        _check_layer(file, layer)
    peft = all(layer.name.startswith(PEFT_PREFIX) for layer in layers)
    return LoraFile(file, tuple(layers), tuple(strays), _settings(file, metadata, peft))


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Name -> shape of the tensors in a .safetensors file, and its metadata; ConfigError if it is damaged."""
    open_regular(path).close()
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return shapes, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged ({first_line(error)}).") from None


def _split(key: str) -> tuple[str, str]:
    """The layer's name and the part that a key is; no part: it belongs to no LoRA layer."""
    for part, pattern in PARTS:
        if match := pattern.search(key):
            return key[: match.start()], part
    return key, ""


def _check_layer(file: Path, layer: Layer) -> None:
    """A and B are there and fit each other."""
    for part, other in (("A", "B"), ("B", "A")):
        if part not in layer.keys:
            given = layer.keys.get(other) or next(iter(layer.keys.values()))
            raise ConfigError(f"{file} is not whole: it has {given}, but no matrix {part} (down: A, up: B) beside it.")
    a, b = layer.shapes["A"], layer.shapes["B"]
    if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
        raise ConfigError(f"{file} is damaged: the ranks of A {a} and B {b} differ in its layer {layer.name}.")


def _settings(file: Path, metadata: Mapping[str, str], peft: bool) -> dict[str, Any]:
    """Peft's settings, from the folder of a peft file, whatever its name, or from the header of diffusers'."""
    settings: dict[str, Any] = {}
    if file.name == PEFT_FILE or (peft and (file.parent / PEFT_CONFIG).is_file()):
        settings = read_object(file.parent / PEFT_CONFIG)
    elif METADATA in metadata:
        stored = parse_json(metadata[METADATA], f"the {METADATA} of {file}")
        if not isinstance(stored, dict):
            raise ConfigError(f"the {METADATA} of {file} is not a JSON object.")
        prefix = "transformer."
        settings = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    return _checked(file, settings)


def _checked(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("peft_type", "LORA") not in ("LORA", None):
        raise ConfigError(f"{file} is peft's {str(settings['peft_type'])[:40]!r}; it takes LORA.")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(OTHER_BASE):
        raise ConfigError(
            f"{file} was begun with init_lora_weights = {start!r:.40}, which changes the base model's own weights; "
            "save it converted to a plain LoRA (peft: path_initial_model_for_weight_conversion)."
        )
    for key, value in (("r", settings.get("r")), ("lora_alpha", settings.get("lora_alpha"))):
        _check_number(file, key, value)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict):
            raise ConfigError(f"{file}: the {key} of its settings is {pattern!r:.60}, not an object.")
        for name, value in pattern.items():
            _check_number(file, f"{key}[{name[:60]!r}]", value)
            _check_pattern(file, key, name)
    return settings


def _check_number(file: Path, key: str, value: Any) -> None:
    fits = value is None or (type(value) in (int, float) and math.isfinite(value) and value > 0)
    if not fits:
        raise ConfigError(f"{file}: {key} of its settings is {value!r:.60}, not a number above 0.")


def _check_pattern(file: Path, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{file}: {pattern!r:.60} in the {key} of its settings is no pattern ({error}).") from None
