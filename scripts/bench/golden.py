"""Whether the present tree trains as another revision does, bit for bit: the net under a move of code.

    python scripts/bench/golden.py --against REV
    python scripts/bench/golden.py --against REV --only grpo_sde drtune --out golden.json

Each case is a short training of the tiny SD3 through scripts/train/train_sd3.py, once in a worktree of REV and once in
the present tree. Then every metric but seconds, and every tensor of the last checkpoint, must be the same. Only the
command line is used, so it works across any move. A key or a metric that was renamed on purpose stands in KEYS or
METRICS, a metric that is new in NEW. Prints a line a case; exit code 1 if one differs. About eight minutes on two
cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.runs.folder import HISTORY_FILE
from flow_grpo.runs.history import read_history
from flow_grpo.runs.saved import CHECKPOINTS, finished_checkpoints

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/train/train_sd3.py"
GRPO, DRTUNE = "tiny_sd3", "tiny_sd3_use_gradient"
# A key here -> its name in the older tree, and what its values are there.
KEYS: Mapping[str, tuple[str, Mapping[Any, Any]]] = {"train.advantage_std": ("train.global_std", {"batch": True})}
METRICS: Mapping[str, str] = {}  # a metric of the older tree -> its name here
NEW = ("train/learning_rate",)  # metrics that the older tree may lack
SMALL: Mapping[str, Any] = {
    "trackers": (), "num_threads": 1, "num_epochs": 2, "save_freq": 1, "eval_freq": 2, "num_seeds": 4,
    "diversity.num_prompts": 2, "eval_diversity": False, "lora.rank": 4, "eval.num_prompts": 2,
    "eval.num_image_per_prompt": 2, "eval.num_steps": 4, "sample.num_steps": 4, "sample.groups_per_epoch": 4,
    "sample.num_image_per_prompt": 4, "sample.batch_size": 8, "train.batch_size": 4,
}  # fmt: skip
GUIDED = {"sample.guidance_scale": 2.0, "eval.guidance_scale": 2.0}
EVERYTHING = {
    "eval_diversity": True, "eval_ode_log_prob": True, "visualize_steps": True, "entropy.num_prompts": 2,
    "entropy.num_image_per_prompt": 2, "entropy.num_strip_prompts": 2, "eval.rewards": ("jpeg_compressibility",),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One short training."""

    name: str
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    stop_at: int = 0  # epochs of a first session, from whose checkpoint a second goes on; 0: one session


CASES = (
    Case("grpo_sde", GRPO),
    Case("grpo_cps", GRPO, {"sample.sde_type": "cps", "train.clip_range": 0.1}),
    Case("grpo_dance", GRPO, {"sample.sde_type": "dance"}),
    Case("grpo_window", GRPO, {"sample.sde_window_size": 2, "sample.sde_window_range": (0, 3)}),
    Case("grpo_guided_kl", GRPO, GUIDED | {"train.beta": 0.1}),
    Case("grpo_guided_kl_velocity", GRPO, GUIDED | {"train.beta": 0.1, "train.kl_space": "velocity"}),
    Case("grpo_negative", GRPO, {"train.advantage_mode": "negative"}),
    Case("grpo_weighted", GRPO, {"train.advantage_mode": "weighted", "train.advantage_std": "batch"}),
    Case("grpo_guard", GRPO, {"train.ratio_normalization": True}),
    Case("grpo_two_inner_epochs", GRPO, {"train.num_inner_epochs": 2, "train.timestep_fraction": 0.5}),
    Case("grpo_jpeg", GRPO, {"reward_fn.pickscore": 0.0, "reward_fn.jpeg_compressibility": 1.0}),
    Case("ratio_ode_step", "tiny_sd3_ode_step"),
    Case("ratio_ode_path", "tiny_sd3_ode_path"),
    Case("ratio_cfm", "tiny_sd3_cfm", {"train.ratio_probes": 2}),
    Case("drtune", DRTUNE),
    Case("drtune_guided", DRTUNE, GUIDED),
    Case("drtune_two_pass", DRTUNE, {"drtune.two_pass": True}),
    Case("drtune_early_stop", DRTUNE, {"drtune.early_stop": 2}),
    Case("drtune_hinge", DRTUNE, {"drtune.hinge": 0.6}),
    Case("drtune_kl", DRTUNE, {"train.beta": 0.1}),
    Case("drtune_stochastic", DRTUNE, {"sample.sde_type": "sde"}),
    Case("full_grpo", GRPO, {"use_lora": False, "train.beta": 0.1}),
    Case("full_drtune", DRTUNE, {"use_lora": False, "train.ema": False}),
    Case("bf16_grpo", GRPO, {"mixed_precision": "bf16", "train.max_ratio_error": 1e9}),
    Case("bf16_drtune", DRTUNE, {"mixed_precision": "bf16"}),
    Case("everything_grpo", GRPO, EVERYTHING),
    Case("everything_drtune", DRTUNE, EVERYTHING | {"gradient_checkpointing": True}),
    Case("two_processes_grpo", GRPO, {"eval_diversity": True}, processes=2),
    Case("two_processes_drtune", DRTUNE, processes=2),
    Case("resumed_grpo", GRPO, EVERYTHING, stop_at=1),
    Case("resumed_drtune", DRTUNE, stop_at=1),
)  # fmt: skip


# --- trainings ------------------------------------------------------------------------------------------


def train(case: Case, tree: Path, run: Path, older: bool) -> None:
    """Train a case by a tree's script, into the folder `run`; ConfigError, with the end of its output, if it fails."""
    begin = [f"--config=config/grpo.py:{case.recipe}", *changes_of(case, run, older)]
    if not case.stop_at:
        return _start(case, tree, run, begin)
    _start(case, tree, run, [*begin, f"--config.num_epochs={case.stop_at}"])
    _start(case, tree, run, [f"--config.resume_from={run}", f"--config.num_epochs={SMALL['num_epochs']}"])
    return None


def changes_of(case: Case, run: Path, older: bool) -> list[str]:
    """The command line's KEY=VALUE, by the names of the tree."""
    fewer = {"drtune.num_train_steps": 2} if case.recipe == DRTUNE else {}
    values = {**SMALL, **fewer, **case.changes, "logdir": run.parent, "run_name": run.name}
    if older:
        former = {key: (*KEYS.get(key, (key, {})), value) for key, value in values.items()}
        values = {name: meanings.get(value, value) for name, meanings, value in former.values()}
    return [f"--config.{key}={value}" for key, value in values.items()]


def _start(case: Case, tree: Path, run: Path, arguments: Sequence[str]) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    command = [sys.executable, *(several if case.processes > 1 else []), SCRIPT, *arguments]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    run.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        end = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"{case.name} in {tree} ended with exit code {done.returncode}: {end}")


# --- comparison -----------------------------------------------------------------------------------------


def difference(before: Path, after: Path) -> str:
    """The first thing in which two runs differ; empty: there is none."""
    histories = [history(before, METRICS), history(after, {})]
    histories[1] = {key: value for key, value in histories[1].items() if key in histories[0] or not key.startswith(NEW)}
    if first := _first_difference(*histories):
        return f"metrics: {first}"
    if first := _first_difference(*(tensors(run) for run in (before, after))):
        return f"tensors: {first}"
    return ""


def history(run: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Every metric by "name at step", but for seconds, under its present name."""
    found: dict[str, Any] = {}
    for number, line in enumerate(read_history(run / HISTORY_FILE)):
        for name, value in line.items():
            if "seconds" not in name and not name.startswith("perf/"):
                found[f"{names.get(name, name)} at step {line['step']}, line {number}"] = value
    return found


def tensors(run: Path) -> dict[str, Any]:
    """Dtype, shape and bytes of every tensor of the last checkpoint, by "file: name"."""
    from safetensors.torch import load_file

    checkpoints = finished_checkpoints(run / CHECKPOINTS)
    folder, found = checkpoints[max(checkpoints)], {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            key = f"{file.relative_to(folder)}: {name}"
            found[key] = str(tensor.dtype), tuple(tensor.shape), _bytes_of(tensor)
    return found


def _bytes_of(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    missing = sorted(before.keys() ^ after.keys())
    if missing:
        return f"{missing[0]} is in one of them alone ({len(missing)} are)"
    differ = [name for name, value in before.items() if value != after[name]]
    if not differ:
        return ""
    old, new = before[differ[0]], after[differ[0]]
    values = "" if isinstance(old, tuple) else f", {old} and {new}"
    return f"{differ[0]} differs{values} ({len(differ)} of {len(before)} do)"


# --- all of it ------------------------------------------------------------------------------------------


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of a revision, for as long as it takes; ConfigError if there is no such revision."""
    if not _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"):
        raise ConfigError(f"--against {revision} names no commit.")
    _git("worktree", "add", "--detach", str(folder), revision)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def compare(case: Case, older: Path, runs: Path) -> str:
    """Train a case in both trees at once; the first difference, or why one of them failed."""
    folders = [runs / f"{case.name}-before", runs / f"{case.name}-after"]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, case, *each) for each in ((older, folders[0], True), (ROOT, folders[1], False))]
    try:
        for one in both:
            one.result()
    except ConfigError as error:
        return str(error)
    return difference(*folders)


def main() -> None:
    """Exit code 1 if a case differs, 2 after a sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the revision that is right")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", choices=[case.name for case in CASES])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    found: dict[str, str] = {}
    with (
        one_sentence_errors(),
        tempfile.TemporaryDirectory() as place,
        worktree(arguments.against, Path(place, "tree")) as older,
    ):
        against = _git("-C", str(older), "rev-parse", "HEAD")
        for case in chosen:
            found[case.name] = compare(case, older, Path(place))
            print(f"{case.name:<24} {found[case.name] or 'equal'}", flush=True)
    equal = sum(not text for text in found.values())
    print(f"{equal} of {len(found)} cases are equal to {against[:12]}")
    if arguments.out:
        here = {"present": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain"))}
        record = {"against": against, **here, "equal": equal, "cases": {k: v or "equal" for k, v in found.items()}}
        write_atomically(arguments.out, strict_json(record, indent=1) + "\n")
    raise SystemExit(0 if equal == len(found) else 1)


if __name__ == "__main__":
    main()
