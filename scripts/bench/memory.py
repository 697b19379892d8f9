"""Which card runs what: the peak memory of every phase of an epoch, for six models at their real sizes.

    python scripts/bench/memory.py [--out assets/figures/memory] [--models SD3.5-medium ...] [--measure]

It writes `results.json` and `table.md`. Nothing is loaded and no GPU is needed: the package's own code runs on tensors
without data, whose bytes are counted (memory_phases.py says how), at sizes typed by hand
(memory_models.py). With `--measure`, on a GPU, the same code runs on random weights, and torch's allocator is asked.

One image at a time, 512 and 1024 pixels, bf16, prompts of the longest length, guidance and LoRA of each model's recipe,
PickScore as the reward, no KL penalty (with it, full fine-tuning keeps a second copy of the transformer).

Not counted: the CUDA context (about 0.5 GiB), what the allocator loses to fragments, workspaces of cuDNN and of
attention kernels, and of several GPUs the buffers of NCCL. So a card counts as `USABLE` of its memory. What several
GPUs share is not run: `sharding = "full"` is arithmetic on the same counts (`peaks`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
PIXELS = (512, 1024)
CARDS = {"24 GB": 24.0, "48 GB": 48.0, "80 GB": 79.6, "141 GB": 140.4}  # GiB that the driver shows
USABLE = 0.9  # of a card's memory: see the docstring
PHASES = ("encoding", "sampling", "scoring", "training", "updating")
METHODS = {"grpo": "GRPO", "drtune": "DRTune, two passes"}
TUNINGS = {"lora": "LoRA", "full": "all weights"}


@dataclass(frozen=True)
class Options:
    """What saves memory."""

    offload_text: bool = False  # pretrained.offload_text
    vae: str = "fp32"  # pretrained.vae_dtype
    offload_rewards: bool = False
    gpus: int = 1  # that share the transformer, sharding = "full"


WAYS = {  # by the name of its column
    "as it is": Options(),
    "spared": Options(offload_text=True, vae="bf16", offload_rewards=True),
    "spared, 8 GPUs": Options(offload_text=True, vae="bf16", offload_rewards=True, gpus=8),
}


def peaks(row: Mapping[str, Any], method: str, options: Options, plain: bool = False) -> dict[str, int]:
    """The most bytes of each phase, on one GPU.

    Args:
        row: one of the results.
        plain: without gradient checkpointing.
    """
    held, extra = row["held"], row["extra"]
    own = held["transformer"] + held["moments"] + held["average"]
    gradients, updating = held["gradients"], extra["updating"]
    if options.gpus > 1:
        own, gradients, updating = (value // options.gpus for value in (own, gradients, updating))
        own += held["gathered"]
    always = own + held[f"vae_{options.vae}"]
    always += 0 if options.offload_text else held["text"]
    always += 0 if options.offload_rewards else held["reward"]
    score = f"decoding_gradient_{options.vae}" if method == "drtune" else f"decoding_{options.vae}"
    return {
        "encoding": always + extra["encoding"] + (held["text"] if options.offload_text else 0),
        "sampling": always + extra["sampling"],
        "scoring": always + extra[score] + (held["reward"] if options.offload_rewards else 0),
        "training": always + gradients + extra["training_plain" if plain else "training"],
        "updating": always + gradients + updating,
    }


def card(peak: int) -> str:
    """The smallest that is enough; empty: none."""
    return next((name for name, gib in CARDS.items() if peak <= USABLE * gib * GIB), "")


# --- counting -----------------------------------------------------------------------------------------------


def count(model: Any, tunings: Sequence[str], pixels: Sequence[int], measure: bool) -> list[dict[str, Any]]:
    """The rows of one model."""
    import torch

    from scripts.bench import memory_models, memory_phases

    device = torch.device("cuda" if measure else "cpu")
    meter = memory_phases.measured if measure else memory_phases.counted
    rows = []
    with memory_phases.real_or_not(measure):
        text = memory_phases.of_text(model, device, meter)
        reward = memory_models.build_reward(device)
        for size in pixels:
            scoring: dict[str, int] = {}
            for tuning in tunings:
                precision = torch.float32 if tuning == "full" else torch.bfloat16
                family = memory_models.build_family(model, device, precision)
                parameters = memory_models.parameters(family.transformer)
                policy = memory_phases.policy_of(family, memory_models.settings(model, size, tuning), device)
                held = memory_phases.held_by(policy) | {"text": text["weights"]}
                held["reward"] = memory_phases.held(reward.scorer.model.parameters())
                scoring = scoring or memory_phases.of_scoring(policy, reward, meter)  # the same for all
                extra = {"encoding": text["encoding"], **scoring}
                extra |= memory_phases.of_training(policy, meter, plain=tuning == "lora")
                rows.append(
                    {"model": model.name, "pixels": size, "tuning": tuning, "parameters": parameters,
                     "guidance": policy.settings.config.sample.guidance_scale, "held": held, "extra": extra}
                )  # fmt: skip
                del family, policy  # before the next is made
    return rows


def rendered(template: str, results: Mapping[str, Any]) -> str:
    """Markdown: memory.md.j2, everything; hardware.md.j2, the page of the documentation."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(template).render(
        results=results, peaks=peaks, card=card, ways=WAYS, methods=METHODS, tunings=TUNINGS, phases=PHASES,
        options=Options, cards=CARDS, usable=USABLE, gib=lambda size: f"{size / GIB:.1f}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Count or measure, and write; 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="logs/bench/memory", help="folder to write (default: %(default)s)")
    parser.add_argument("--models", nargs="*", default=(), help="some of them (default: all)")
    parser.add_argument("--pixels", nargs="*", type=int, default=PIXELS, help="(default: 512 1024)")
    parser.add_argument("--tunings", nargs="*", default=tuple(TUNINGS), choices=TUNINGS)
    parser.add_argument("--measure", action="store_true", help="on a GPU, random weights")
    parser.add_argument("--table", action="store_true", help="only write table.md again, from results.json")
    parser.add_argument("--page", default="", help="write the page of the documentation, too")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = Path(args.out)
    if not args.table:
        import diffusers
        import torch

        from scripts.bench.memory_models import MODELS

        if unknown := set(args.models) - {model.name for model in MODELS}:
            print(
                f"--models has no {', '.join(sorted(unknown))}; it takes {', '.join(m.name for m in MODELS)}.",
                file=sys.stderr,
            )
            return 2
        if args.measure and not torch.cuda.is_available():
            print("--measure needs a GPU, and torch finds none.", file=sys.stderr)
            return 2
        torch.set_num_threads(1)
        diffusers.logging.set_verbosity_error()  # it warns of every change of dtype
        begun, cpu, rows = time.monotonic(), time.process_time(), []
        for model in [model for model in MODELS if not args.models or model.name in args.models]:
            rows += count(model, args.tunings, args.pixels, args.measure)
            logging.info("%s: %.0f s", model.name, time.monotonic() - begun)
        results = {
            "command": " ".join(["python scripts/bench/memory.py", *(arguments or sys.argv[1:])]),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if args.measure else "",
            "seconds": time.monotonic() - begun,
            "cpu_seconds": time.process_time() - cpu,
            "rows": rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (out / "table.md").write_text(rendered("memory.md.j2", results), encoding="utf-8")
    if args.page:
        Path(args.page).write_text(rendered("hardware.md.j2", results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
