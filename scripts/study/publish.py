"""Put a demo's figures into the repository: PNGs and numbers in assets/figures/demo/, its table in README.md.

    python scripts/study/publish.py logs/demo/report

tests/test_publish.py checks that the README says what assets/figures/demo/summary.json says.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "assets/figures/demo"
README = ROOT / "README.md"
SHOWN = ("samples.png", "reward_vs_seconds.png", "judge_accuracy.png", "modes.png", "vendi_rke.png", "entropy.png")
BEGIN, END = "<!-- demo -->", "<!-- /demo -->"


def demo_section(summary: dict[str, Any]) -> str:
    """The README's paragraph, table and pictures of a demo, from its summary.json."""
    crossing = next(c for c in summary["crossings"] if c["runner"] == "DRTune" and c["target"] == "GRPO")
    states = {"base model": summary["base"], **summary["runs"]}
    if crossing["evaluation"] is not None:
        states["DRTune at GRPO's reward"] = crossing["evaluation"]
    rows = [
        f"| {name} | {state['seconds']:.0f} | {state['network_evaluations']:,} | {state['reward/total']:.4f} "
        f"| {state['judge/accuracy']:.1%} | {state['modes/entropy']:.2f} | {_diversity(state)} | {_density(state)} |"
        for name, state in states.items()
    ]
    images = "\n".join(
        f"![{name.removesuffix('.png').replace('_', ' ')}](assets/figures/demo/{name})" for name in SHOWN
    )
    return "\n".join(
        [
            BEGIN,
            "One demo, seed 42, as committed in `assets/figures/demo`. Rewards are measured on noise that is never",
            "trained on; the judge is a CLIP trained apart from it; eight equal shares have an entropy of 2.08;",
            "forward passes are counted, backward passes are not. Vendi score and RKE are means over prompts, of 16",
            "images each and in the judge's features, with 95 % intervals over the images.",
            "",
            "| | training seconds | network evaluations | reward | judge accuracy | colour entropy (nats) "
            "| Vendi score | RKE | differential entropy (nats) | std of log p (nats) |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            _crossing_sentence(crossing),
            "This is one seed. Compare diversity at equal reward, the last row with GRPO's; and mind the judge: where",
            "its accuracy falls while the reward rises, the reward is exploited.",
            "",
            images,
            END,
        ]
    )


def _diversity(state: dict[str, Any]) -> str:
    """Vendi score and RKE with their intervals, where they were measured."""
    if "diversity/vendi" not in state:
        return "not measured | not measured"
    names = ("diversity/vendi", "diversity/rke")
    return " | ".join(f"{state[n]:.2f} ({state[f'{n}_low']:.2f} to {state[f'{n}_high']:.2f})" for n in names)


def _density(state: dict[str, Any]) -> str:
    """Differential entropy with its standard error, and the spread of the log-density, where they were measured."""
    if "entropy/nats" not in state:
        return "not measured | not measured"
    entropy, error = state["entropy/nats"], state["entropy/standard_error"]
    return f"{entropy:.1f} ± {error:.1f} | {state['ode_log_prob/std']:.1f}"


def _crossing_sentence(crossing: dict[str, Any]) -> str:
    if not crossing["meaningful"]:
        return "GRPO's reward did not rise in this demo."
    if crossing["seconds"] is None:
        return "DRTune did not reach GRPO's final reward in this demo."
    return (
        f"DRTune reached GRPO's final reward ({crossing['level']:.4f}) in {crossing['seconds']:.1f} s of training, "
        f"{crossing['fraction_of_seconds']:.1%} of GRPO's time."
    )


def main() -> None:
    """Copy and rewrite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the report folder of a demo")
    report = parser.parse_args().report
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in (*SHOWN, "summary.json"):
        shutil.copyfile(report / name, FIGURES / name)
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + demo_section(json.loads((FIGURES / "summary.json").read_text())) + after)


if __name__ == "__main__":
    main()
