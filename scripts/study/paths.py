"""Where the study's results and pages lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "assets/study"  # results and figures
RATIOS, NOISE = "ratios.json", "gradient_noise.json"  # there
PAGE, README = ROOT / "docs/study.md", ROOT / "README.md"
VALIDATION = ROOT / "assets/figures/entropy_validation/results.json"
