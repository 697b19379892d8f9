"""The LoRA files that other trainers write: what they hold, and which layers of an SD3 transformer they mean.

Read are names, shapes and settings alone: no torch is imported, and nothing is ever unpickled. A file's keys may be

    diffusers        transformer.transformer_blocks.0.attn.to_q.lora_A.weight, ....lora.down.weight
    peft             base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight, beside an adapter_config.json
    kohya            lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight, with .alpha, also lora_transformer_...
    ai-toolkit       diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight

and may name layers as diffusers or as SD3's own code does (joint_blocks.0.x_block.attn.qkv, which is three of ours).

A layer adds scale B A to a weight W; with DoRA (arXiv 2402.09353) W' = m (W + scale B A) / |W + scale B A|, row by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
PREFIXES = re.compile(r"^(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|module\.)")
PEFT_PREFIX = "base_model.model."
FLAT_PREFIXES = re.compile(r"^(?:lora_unet_|lora_transformer_|lycoris_)")
TEXT_ENCODER = re.compile(r"^(?:base_model\.model\.)?(?:text_encoder|text_model|te\d|lora_te|clip_[lg]|t5xxl)")


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


@dataclass(frozen=True)
class Target:
    """A module of the transformer, and which parts of a file's rows are its own: (0,) of 1 is all."""

    module: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1


@dataclass(frozen=True)
class Placement:
    """One module, and what it gets."""

    layer: Layer
    target: Target
    scale: float | None  # alpha / rank; None: alpha is a tensor of the file


@dataclass(frozen=True)
class Plan:
    """Which of a file's layers go where in one transformer."""

    file: LoraFile
    placements: tuple[Placement, ...]
    text_encoder: tuple[str, ...] = ()  # names of layers that are left out, being a text encoder's
    unknown: tuple[str, ...] = field(default=())  # names of layers, and other keys, that are no module's

    @property
    def layers(self) -> int:
        """Of the file, that have a place."""
        return len({placement.layer.name for placement in self.placements})


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


# --- matching -------------------------------------------------------------------------------------------


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its weight, from the files of a pipeline's transformer; {}: they are of another kind."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        shapes |= read_header(path)[0]
    return weight_matrices(shapes)


def weight_matrices(parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Module -> shape, of the parameters that are the weights of linear maps and convolutions."""
    names = {name: shape for name, shape in parameters.items() if name.endswith(".weight") and ".lora_" not in name}
    return {
        name.removesuffix(".weight").removesuffix(".base_layer"): shape
        for name, shape in names.items()
        if len(shape) >= 2
    }


def match(file: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Find each layer's module among those of a transformer.

    Args:
        shapes: `transformer_shapes` or `weight_matrices`.

    Raises:
        ConfigError: no layer has a module, or one has other shapes: it is another model's; two are one module's; or its
            settings and its tensors disagree.
    """
    known = _spellings(shapes)
    placements: list[Placement] = []
    others: dict[bool, list[str]] = {True: [], False: list(file.strays)}
    for layer in file.layers:
        targets = known.get(_plain(layer.name), ())
        if not targets:
            others[bool(TEXT_ENCODER.match(layer.name))].append(layer.name)
        for target in targets:
            _check_shapes(file, layer, target, shapes[target.module])
            placements.append(Placement(layer, target, _scale(file, layer, target)))
    _check_plan(file, placements)
    return Plan(file, tuple(placements), tuple(others[True]), tuple(others[False]))


def _plain(name: str) -> str:
    """A layer's name without what trainers put before it, old attention processors' spelling undone."""
    name = FLAT_PREFIXES.sub("", name)
    while match := PREFIXES.match(name):
        name = name[match.end() :]
    name = name.replace(".processor.", ".")
    return f"{name}.0" if name.endswith(".to_out") else name


def _spellings(modules: Mapping[str, Any]) -> dict[str, tuple[Target, ...]]:
    """What files may call a module, or several at once: with dots or, as kohya does, underscores.

    Underscored names that two modules share are nobody's.
    """
    dotted: dict[str, list[Target]] = {module: [Target(module)] for module in modules}
    for name, target in _original_names(modules):
        dotted.setdefault(name, []).append(target)
    flat: dict[str, list[list[Target]]] = {}
    for name, targets in dotted.items():
        flat.setdefault(name.replace(".", "_"), []).append(targets)
    unique = {name: tuple(found[0]) for name, found in flat.items() if len(found) == 1}
    return unique | {name: tuple(targets) for name, targets in dotted.items()}


# SD3's own names, as diffusers.loaders.single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers reads them.
BLOCK = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", None),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn2.to_out.0": ("x_block.attn2.proj", None),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn.to_add_out": ("context_block.attn.proj", None),
    "norm1.linear": ("x_block.adaLN_modulation.1", None),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", None),
    "ff.net.0.proj": ("x_block.mlp.fc1", None),
    "ff.net.2": ("x_block.mlp.fc2", None),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", None),
    "ff_context.net.2": ("context_block.mlp.fc2", None),
}
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def _original_names(modules: Mapping[str, Any]) -> Iterator[tuple[str, Target]]:
    """SD3's own name of each module; scale and shift stand in the other order in the norms that end a stream."""
    blocks = [int(name.split(".")[1]) for name in modules if name.startswith("transformer_blocks.")]
    ends = {"norm_out.linear", f"transformer_blocks.{max(blocks, default=-1)}.norm1_context.linear"}
    for module in modules:
        _, _, rest = module.partition("transformer_blocks.")
        number, _, inside = rest.partition(".")
        swapped = ((1, 0), 2) if module in ends else ((0,), 1)
        if module in OUTSIDE:
            yield OUTSIDE[module], Target(module, *swapped)
        elif inside in BLOCK:
            name, third = BLOCK[inside]
            yield f"joint_blocks.{number}.{name}", Target(module, *(swapped if third is None else ((third,), 3)))


def _check_shapes(file: LoraFile, layer: Layer, target: Target, weight: tuple[int, ...]) -> None:
    """The layer's matrices are of this weight: (out, in) or (out, in, k, k)."""
    a, b = layer.shapes["A"], layer.shapes["B"]
    rows = weight[0] * (target.of if len(target.chunks) == 1 else 1)
    if a[1:] != weight[1:] or b[0] != rows or math.prod(b[2:]) != 1:
        raise ConfigError(
            f"{file.path} is the LoRA of another model: its {layer.name} has A {a} and B {b}, but the weight of "
            f"{target.module} here is {weight}."
        )
    magnitude = layer.shapes.get("magnitude", (rows,))
    if math.prod(magnitude) != rows or (len(magnitude) == 2 and magnitude[0] != rows):
        raise ConfigError(
            f"{file.path}: the magnitude of its layer {layer.name} has shape {magnitude}; it takes one number for each "
            f"of the {rows} outputs."
        )


def _scale(file: LoraFile, layer: Layer, target: Target) -> float | None:
    """Alpha / rank, or alpha / sqrt(rank) if the settings say so; 1 where nothing says."""
    if "alpha" in layer.keys:
        return None
    settings = file.settings
    rank = _of_module(settings, "rank_pattern", settings.get("r"), target.module)
    if rank is not None and rank != layer.rank:
        raise ConfigError(
            f"{file.path}: its settings give {target.module} the rank {rank}, but A has shape {layer.shapes['A']}."
        )
    alpha = _of_module(settings, "alpha_pattern", settings.get("lora_alpha"), target.module)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(layer.rank) if settings.get("use_rslora") else layer.rank)


def _of_module(settings: Mapping[str, Any], key: str, default: float | None, module: str) -> float | None:
    """What a pattern of the settings says of a module: the first that is the end of its name, as peft reads it."""
    for pattern, value in (settings.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_plan(file: LoraFile, placements: list[Placement]) -> None:
    if not placements:
        first = next(iter(file.layers[0].keys.values()))
        raise ConfigError(
            f"{file.path}: none of its {len(file.layers)} layers is one of this SD3 transformer's (the first key is "
            f"{first!r}); known are the keys of {FORMATS}."
        )
    seen: dict[str, str] = {}
    for placement in placements:
        module, name = placement.target.module, placement.layer.name
        if module in seen:
            raise ConfigError(f"{file.path} has two layers for {module}: {seen[module]} and {name}.")
        seen[module] = name
    with_magnitude = ["magnitude" in placement.layer.keys for placement in placements]
    if any(with_magnitude) != all(with_magnitude) or (file.settings.get("use_dora") and not any(with_magnitude)):
        missing = placements[with_magnitude.index(False)].layer.name
        raise ConfigError(f"{file.path} is a DoRA that is not whole: its layer {missing} has no magnitude.")
