"""A session with `fme` from an empty folder, kept as it went: docs/front_door.md, its pictures in docs/front_door/.

    python scripts/docs/front_door.py

Two random LoRAs are saved, one by stock diffusers and one by peft, and checked; two folders of images are compared; a
training is watched, stopped by Ctrl-C, resumed and viewed. Needs Debian's chromium for the pictures. About five
minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError
from flow_grpo.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAME, TEMPLATE = "front_door", "front_door.md.j2"
EPOCHS = 48  # of the training; stopped by Ctrl-C after the evaluation of STOP_AFTER
STOP_AFTER = 24
TALL, NARROW = (1280, 1700), (390, 1500)  # pixels of the pictures
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # what moves a terminal's cursor
BROWSER = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command as a user types it, and what it said."""

    title: str
    command: str
    output: str


@dataclass(frozen=True)
class Picture:
    """A screenshot of the page that a command wrote."""

    file: str
    title: str


def session(folder: Path) -> list[Step]:
    """Everything, in order, in an empty folder."""
    save_random_loras(folder)
    train = f"fme train tiny_drtune --name first num_epochs={EPOCHS} eval_freq=8 save_freq=8"
    return [
        run("A LoRA that stock diffusers saved", "fme check by_diffusers --out checks/diffusers", folder),
        run("A LoRA that peft saved", "fme check by_peft --out checks/peft", folder),
        run("Images of the base model", "fme sample assets/tiny_sd3 'a bag' -n 16 --out base/bag", folder),
        run("Images of a LoRA", "fme sample by_peft 'a bag' -n 16 --out lora/bag", folder),
        run("Two folders of images", "fme check lora --against base --out checks/folders", folder),
        run("A training, stopped by Ctrl-C", train, folder, interrupt_after=f"epoch {STOP_AFTER},"),
        run("The same training goes on", "fme train --resume logs/first", folder),
        run("Its page, from its folder alone", "fme view logs/first", folder),
        run("What there is", "fme ls runs", folder),
    ]


def save_random_loras(folder: Path) -> None:
    """by_diffusers/ and by_peft/: random LoRAs of the tiny SD3, each saved by the library's own function."""
    import torch
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(ROOT / "assets/tiny_sd3", dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(
        pipeline.transformer, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
    adapted.save_pretrained(str(folder / "by_peft"))
    state = get_peft_model_state_dict(adapted)
    layers = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    StableDiffusion3Pipeline.save_lora_weights(folder / "by_diffusers", transformer_lora_layers=layers)


def run(title: str, command: str, folder: Path, interrupt_after: str = "") -> Step:
    """Run a command in the folder; with `interrupt_after`, press Ctrl-C when a line says so.

    Raises:
        ConfigError: the command failed.
    """
    print(f"$ {command}", flush=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
        if interrupt_after and interrupt_after in line:
            os.killpg(process.pid, signal.SIGINT)
            interrupt_after = ""
    expected = 128 + signal.SIGINT if "Ctrl-C" in title else 0
    if process.wait() != expected:
        raise ConfigError(f"`{command}` ended with exit code {process.returncode}; its output is above.")
    return Step(title, command, shown("".join(lines), folder))


def shown(output: str, folder: Path) -> str:
    """What stays on a terminal: of a line that was redrawn, the last; no path of this machine; no progress bar."""
    lines = [CONTROL.sub("", line).rstrip() for line in output.splitlines()]
    kept = [line for line in lines if line and not re.search(r"\d+%\|", line)]
    return "\n".join(kept).replace(f"{folder.resolve()}/", "").replace(f"{ROOT}/", "")


def pictures(folder: Path, out: Path) -> list[Picture]:
    """Screenshots of three pages, wide and narrow."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        ("training", "logs/first/page.html", TALL, "The training's page"),
        ("training-narrow", "logs/first/page.html", NARROW, "The same on a telephone"),
        ("lora", "checks/peft/page.html", TALL, "The page of a LoRA"),
        ("folders", "checks/folders/page.html", TALL, "The page of two folders"),
    ]
    return [screenshot(folder / page, out / f"{name}.png", size, title) for name, page, size, title in wanted]


def screenshot(page: Path, file: Path, size: tuple[int, int], title: str) -> Picture:
    """One picture by headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise ConfigError("chromium is not installed; the pictures need it (Debian: apt-get install chromium).")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, *BROWSER, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
             f"--screenshot={file}", page.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    return Picture(file.name, title)


def write(steps: Sequence[Step], found: Sequence[Picture]) -> None:
    """docs/front_door.md."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    text = environment.get_template(TEMPLATE).render(steps=steps, pictures=found, folder=NAME)
    write_atomically(DOCS / f"{NAME}.md", text)


def main() -> None:
    """Exit code 2 after one sentence where a command fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would fme
    with one_sentence_errors(), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(session(folder), pictures(folder, DOCS / NAME))


if __name__ == "__main__":
    main()
