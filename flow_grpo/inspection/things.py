"""What somebody points at: a run, a checkpoint, a LoRA, a pipeline or a folder of images, found out by looking.

Names say nothing here: what is in a folder does. Nothing loads, and torch is not imported.

    checkpoint   state.json, of flow_grpo/training/checkpoint.py                   (before all: its folders hold LoRAs)
    run          environment.json, metrics.jsonl or a config.json of ours
    pipeline     model_index.json, or a hub id: org/name of no folder
    lora         a .safetensors file of LoRA layers, or a folder with such a file
    images       images, or folders of images
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flow_grpo import paths
from flow_grpo.diversity.images import listing
from flow_grpo.errors import ConfigError
from flow_grpo.files import open_regular, read_object
from flow_grpo.models.lora_files import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, lora_path, read_lora
from flow_grpo.models.pipeline_files import INDEX
from flow_grpo.runs.folder import CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE
from flow_grpo.runs.manifest import MANIFEST
from flow_grpo.runs.saved import CHECKPOINT_STATE, CHECKPOINTS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MOST_LOOKED_AT = 20  # files of a folder that are opened to see whether there are images
LOOKED_FOR = (
    f"a run ({ENVIRONMENT_FILE}), a checkpoint ({CHECKPOINT_STATE}), a pipeline ({INDEX}), a LoRA ({PEFT_CONFIG} with "
    f"{PEFT_FILE}, {DIFFUSERS_FILE}, or another .safetensors file) or images"
)


@dataclass(frozen=True)
class Thing:
    """Something to look at."""

    kind: str  # "run", "checkpoint", "lora", "pipeline" or "images"
    text: str  # as it was named
    path: Path | None  # None: of the hub
    run: Path | None = None  # the folder of the run that it is, or belongs to

    @property
    def name(self) -> str:
        """Short: the last part of its path or id, a checkpoint's and its LoRA's with the run's."""
        if self.path is None:
            return self.text
        name = self.path.resolve().name.removesuffix(".safetensors")
        if self.run is None or self.kind == "run":
            return name
        inside = self.path.resolve().relative_to(self.run.resolve()).parts
        return "-".join((self.run.resolve().name, *(part for part in inside if part != CHECKPOINTS)))

    @property
    def place(self) -> str:
        """The path that libraries take, or the hub id."""
        return self.text if self.path is None else str(self.path)


def find_out(text: str) -> Thing:
    """What a path, or a hub id, names.

    Raises:
        ConfigError: it is nothing of these, or is of one of them but damaged or pickled.
    """
    given = Path(paths.find(text)) if text else Path()
    try:
        there = bool(text) and os.path.lexists(given)
        folder = there and given.is_dir()
        if folder:
            listing(given)  # ConfigError if it may not be looked into
    except (OSError, ValueError):  # a name that is too long, or has a null character
        there = folder = False
    if not there:
        return _of_the_hub(text)
    return _folder(text, given) if folder else _file(text, given)


def _of_the_hub(text: str) -> Thing:
    """A pipeline's id: of two parts, the first of which is nothing here."""
    if (
        HUB_ID.fullmatch(text)
        and text.split("/")[0] not in ("assets", "logs", ".", "..")
        and not Path(text).parent.exists()
    ):
        return Thing("pipeline", text, None)
    raise ConfigError(f"{text!r} does not exist; looked for were {LOOKED_FOR}, and a hub id (org/name).")


def _file(text: str, path: Path) -> Thing:
    if lora_path(path) is not None:
        read_lora(path)
        return Thing("lora", text, path, _run_around(path.parent))
    open_regular(path).close()
    if _is_image(path):
        raise ConfigError(f"{text} is one image; a folder of them can be looked at.")
    raise ConfigError(f"{text} is a file, and no LoRA's, which ends in .safetensors; looked for were {LOOKED_FOR}.")


def _folder(text: str, folder: Path) -> Thing:
    for kind, fits in KINDS.items():
        if fits(folder):
            return Thing(kind, text, *_with_run(kind, folder))
    raise ConfigError(f"{text} holds nothing that can be looked at; looked for were {LOOKED_FOR}.")


def _with_run(kind: str, folder: Path) -> tuple[Path, Path | None]:
    """What is meant, and the folder of its run."""
    if kind == "lora" and not _is_known_lora(folder):
        return lora_path(folder) or folder, _run_around(folder)
    if kind == "run":
        run = folder if _is_run_itself(folder) else folder.resolve().parent
        return run, run
    return folder, _run_around(folder) if kind in ("checkpoint", "lora") else None


def _run_around(folder: Path) -> Path | None:
    """The run whose checkpoint a folder is or lies in; None: it lies in none."""
    for checkpoint in (folder.resolve(), folder.resolve().parent):
        run = checkpoint.parent.parent
        if _is_checkpoint(checkpoint) and checkpoint.parent.name == CHECKPOINTS and _is_run_itself(run):
            return run
    return None


# --- what a folder is ------------------------------------------------------------------------------------


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CHECKPOINT_STATE).is_file() or (folder / MANIFEST).is_file()


def _is_run(folder: Path) -> bool:
    """A run's folder, or that of its checkpoints."""
    return _is_run_itself(folder) or (folder.resolve().name == CHECKPOINTS and _is_run_itself(folder.resolve().parent))


def _is_run_itself(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (ENVIRONMENT_FILE, HISTORY_FILE)):
        return True
    try:
        return isinstance(read_object(folder / CONFIG_FILE).get("pretrained"), dict)
    except ConfigError:
        return False


def _is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _is_lora(folder: Path) -> bool:
    """One that can be read; ConfigError if it is one that cannot."""
    if lora_path(folder) is not None:
        read_lora(folder)
        return True
    if (folder / PEFT_CONFIG).is_file():
        raise ConfigError(f"{folder} has an {PEFT_CONFIG}, but no {PEFT_FILE}.")
    return False


def _is_known_lora(folder: Path) -> bool:
    """Whether its file has the name that diffusers or peft give it."""
    return any((folder / name).exists() for name in (PEFT_CONFIG, DIFFUSERS_FILE))


def _has_images(folder: Path) -> bool:
    """Whether some file in it, or in one of its folders, is an image."""
    files, folders = listing(folder)
    for inner in folders[:MOST_LOOKED_AT]:
        files = files + listing(inner)[0][:MOST_LOOKED_AT]
    return any(_is_image(path) for path in files[: 2 * MOST_LOOKED_AT])


def _is_image(path: Path) -> bool:
    """By the file's first bytes; whether it can be decoded is found when it is."""
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file):
            return True
    except Exception:  # Pillow's decoders raise what they like
        return False


KINDS: dict[str, Callable[[Path], bool]] = {
    "checkpoint": _is_checkpoint,
    "run": _is_run,
    "pipeline": _is_pipeline,
    "lora": _is_lora,
    "images": _has_images,
}
