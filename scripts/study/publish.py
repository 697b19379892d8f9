"""Put a demo's figures into the repository: PNGs and numbers in assets/figures/demo/, its table in README.md.

    python scripts/study/report.py logs/demo/drtune logs/demo/grpo --out logs/demo/report
    python scripts/study/publish.py logs/demo/report

tests/test_publish.py checks that the README says what assets/figures/demo/summary.json says.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, read_text, write_atomically

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
    return " | ".join(
        "not measured"
        if state.get(name) is None
        else f"{state[name]:.2f} ({state[f'{name}_low']:.2f} to {state[f'{name}_high']:.2f})"
        for name in ("diversity/vendi", "diversity/rke")
    )


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
    """Copy and rewrite; exit code 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the report folder of a demo")
    report = parser.parse_args().report
    with one_sentence_errors():
        publish(report)


def publish(report: Path) -> None:
    """The README's part, and then the files that it shows; ConfigError if the report is not that of a demo."""
    missing = [name for name in SHOWN if not (report / name).is_file()]
    if missing:
        raise ConfigError(f"{report / missing[0]} is missing: {report} is not the whole report of a demo.")
    try:
        section = demo_section(read_object(report / "summary.json"))
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        raise ConfigError(f"{report / 'summary.json'} is not that of a demo.") from None
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in (*SHOWN, "summary.json"):
        shutil.copyfile(report / name, FIGURES / name)
    before, rest = read_text(README).split(BEGIN)
    write_atomically(README, before + section + rest.split(END)[1])


if __name__ == "__main__":
    main()
