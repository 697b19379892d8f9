"""Images of a prompt, as PNG files.

fme sample logs/RUN "a red sneaker" -n 8           by its newest checkpoint, with the run's own settings
fme sample LORA "a red sneaker" --base MODEL       a LoRA of any trainer on a pipeline
fme sample MODEL "a red sneaker"                   a pipeline: folder or hub id

Precision, size, steps, guidance and negative prompt are the run's, or else the pipeline's; a prompt with a negative one
of its own, in the run's prompt files, is led away from that. Image s of one seed has the same noise with every model.
Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from flow_grpo.commands.check import add_drawing_arguments, check_one_process, new_folder, options_of, whole
from flow_grpo.errors import ConfigError
from flow_grpo.inspection.looking import look_at, told_as_given
from flow_grpo.inspection.things import find_out
from flow_grpo.rules import text_fault

PLACE = Path("logs", "sample")  # of results, unless --out says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("thing", metavar="THING", help="run, checkpoint, LoRA or pipeline")
    parser.add_argument("prompt", metavar="PROMPT", help="what the images show")
    parser.add_argument("-n", type=whole(1), default=8, metavar="N", help="images (default: 8)")
    add_drawing_arguments(parser)
    parser.add_argument("--out", default="", metavar="DIR", help=f"a new or empty folder (default: {PLACE}/NAME)")


def main(arguments: argparse.Namespace) -> int:
    """Draw, and print the paths; 0. Raises ConfigError before any model loads for bad input."""
    check_one_process("sample")
    thing, prompt = find_out(arguments.thing), arguments.prompt.strip()
    if thing.kind == "images":
        raise ConfigError(f"{thing.text} holds images; `fme check` looks at them, and a model is needed to draw.")
    if not prompt or (fault := text_fault(prompt)):
        raise ConfigError(f"the prompt {'is empty' if not prompt else fault}.")
    options = replace(options_of(arguments), measured=False, prompt=prompt)
    with told_as_given(options), new_folder(arguments.out, PLACE / thing.name) as out:
        look = look_at(thing, None, options)
        from flow_grpo.inspection.comparison import draw_prompt  # torch, once the input is known to be good

        look = replace(look, models=look.models[-1:])
        loaded, images = draw_prompt(look, prompt, arguments.n)
        for lora in loaded:
            print(f"{lora.name}: {lora}", file=sys.stderr)
        for number, image in enumerate(images):
            image.save(out / f"{number:03d}.png")
            print(out / f"{number:03d}.png")
    return 0


if __name__ == "__main__":
    from flow_grpo.commands.main import main as fme

    raise SystemExit(fme(["sample", *sys.argv[1:]]))
