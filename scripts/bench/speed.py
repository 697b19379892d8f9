"""What an epoch costs beside the bare calls of its network, the least that it can cost: on one core, by the tiny SD3.

    python scripts/bench/speed.py                       about half an hour
    python scripts/bench/speed.py --quick               the cases alone, not against batch and steps: five minutes
    python scripts/bench/speed.py --against COMMIT      beside another commit, in a worktree of it

- Seconds are CPU seconds of a process with one thread: what else the machine does hardly counts. An epoch and its bare
  calls take turns; the ratio is the median over these pairs. A process measures one case; with --against the two trees
  take turns, too, each measured by this very file.
- Bare calls: diffusers' transformer with its LoRA, as many images a call, as many calls with and without backward pass
  as the epoch was counted to make. They decode nothing, score nothing, guide nothing, step nothing, and never compile.
- An evaluation's bare calls are those of its sampler. Those of the log-densities are a forward and a product with J for
  each probe.
- A first epoch is left out; of a compiled network, what it takes longer is the compiling, without that of torch's own
  worker processes, or the reading of what torch has kept.

Writes results.json and table.md into assets/figures/speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

if TYPE_CHECKING:
    from flow_grpo.policy import Policy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "assets/figures/speed"
GRPO, NFT, DRTUNE = "tiny_grpo", "tiny_nft", "tiny_drtune"
ROUNDS, QUICK_ROUNDS = 7, 3
PROBES = 4  # of a log-density


@dataclass(frozen=True)
class Case:
    """What is timed: an epoch of a recipe with changes, or something else of its policy."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    what: str = "epoch"  # or "evaluation", "entropy"


CASES: Mapping[str, Case] = {
    "GRPO": Case(GRPO),
    "GRPO, guided": Case(GRPO, {"sample.guidance_scale": 4.5}),
    "GRPO, compiled": Case(GRPO, {"compile": "on"}),
    "NFT": Case(NFT),
    "NFT, rollout in bf16": Case(NFT, {"forward.rollout": "bf16"}),
    "DRTune, one pass": Case(DRTUNE),
    "DRTune, two passes": Case(DRTUNE, {"drtune.two_pass": True}),
    "log-densities": Case(GRPO, {"entropy.num_probes": PROBES}, "entropy"),
    "evaluation": Case(GRPO, {}, "evaluation"),
}
SCALES: Mapping[str, Case] = {
    **{f"GRPO, {n} steps": Case(GRPO, {"sample.num_steps": n}) for n in (5, 20)},
    **{f"GRPO, batches of {n}": Case(GRPO, {"sample.batch_size": n, "train.batch_size": n}) for n in (10, 20, 40)},
}


@dataclass(frozen=True)
class Timed:
    """One case; seconds are medians."""

    seconds: float  # of what is timed
    bare: float  # of the same calls of the network alone
    ratio: float  # of the two, the median over pairs
    first: float  # of the first time, beyond `seconds`
    images: int
    evaluations: int  # forwards of the network, times images
    trained: int  # those of them with a backward pass

    @property
    def images_per_second(self) -> float:
        """Of what is timed."""
        return self.images / self.seconds


# --- one case, in a process of its own --------------------------------------------------------------------


def measure(case: Case, rounds: int) -> Timed:
    """Time a case and its bare calls in turn."""
    with _prepared(case) as (policy, run, bare, images):
        policy.network_evaluations = policy.trained_evaluations = 0
        first = _seconds(run)
        evaluations, trained = policy.network_evaluations, getattr(policy, "trained_evaluations", 0)  # an older tree
        _seconds(bare)
        pairs = [(_seconds(run), _seconds(bare)) for _ in range(rounds)]
    seconds, calls = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return Timed(seconds, calls, ratio, first - seconds, images, evaluations, trained)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


@contextmanager
def _prepared(case: Case) -> Iterator[tuple[Policy, Callable[[], object], Callable[[], object], int]]:
    """The policy; what is timed; the same calls of the network alone, once that has run; how many images it makes."""
    import torch
    from accelerate import Accelerator

    from flow_grpo import places
    from flow_grpo.methods.registry import method_of
    from flow_grpo.policy import Policy
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.recipes.registry import get_config
    from flow_grpo.rewards.building import build_reward
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import resolve

    torch.set_num_threads(1)
    config = get_config(case.recipe)
    config.update_from_flattened_dict(dict(case.changes))
    with tempfile.TemporaryDirectory() as folder:
        config.logdir, config.run_name, config.trackers = folder, "run", ()
        settings, accelerator = resolve(config, 1, cuda=False), Accelerator(cpu=True)
        with Run(settings, accelerator) as run:
            policy, reward = Policy.load(settings, accelerator), build_reward(settings.config, accelerator.device)
            prompts = PromptDataset.load(config.prompts.train)
            if case.what == "epoch":
                loop = places.load(method_of(settings.config).loop)
                images = settings.plan.images

                def timed() -> None:
                    loop(policy, prompts, reward, settings, run)
                    run.counters.epoch += 1

            elif case.what == "evaluation":
                from flow_grpo.evaluators.evaluation import evaluate, sample_evaluators

                evaluators = sample_evaluators(reward, settings, policy.device)
                tested = PromptDataset.load(config.prompts.test)
                images = len(tested.prompts) * config.eval.num_image_per_prompt

                def timed() -> None:
                    evaluate(policy, tested, evaluators, settings, run, "eval")

            else:
                from flow_grpo.evaluators.entropy import prompt_log_densities

                chosen = tuple(prompts.prompts[: config.entropy.num_prompts])
                images = len(chosen) * config.entropy.num_image_per_prompt

                def timed() -> None:
                    prompt_log_densities(policy, chosen, run)

            yield policy, timed, _bare_calls(case, policy), images


def _bare_calls(case: Case, policy: Policy) -> Callable[[], None]:
    """As many calls of diffusers' transformer as were counted when this first runs, on batches of the case's sizes."""
    config = policy.settings.config
    halves = 2 if config.sample.guidance_scale != 1 else 1
    drawn = config.train.batch_size if config.use_reward_gradient else config.sample.batch_size
    sizes = {"epoch": drawn, "evaluation": config.eval.batch_size, "entropy": config.entropy.batch_size}
    without, trained = halves * sizes[case.what], halves * config.train.batch_size
    inputs = {size: _inputs(policy, size) for size in {without, trained}}
    eager = getattr(policy, "eager", nullcontext)  # an older tree has none, and compiles nothing
    counted: list[int] = []

    def calls() -> None:
        if not counted:
            kept = getattr(policy, "trained_evaluations", 0)
            counted.extend((policy.network_evaluations - kept, kept))
        with eager():
            if case.what == "entropy":
                _products(policy, inputs[without], counted[1] // without)
            else:
                _forwards(policy, inputs[without], counted[0] // without)
                _forwards_and_backwards(policy, inputs[trained], counted[1] // trained)

    return calls


def _forwards(policy: Policy, inputs: Mapping[str, Any], count: int) -> None:
    import torch

    with torch.no_grad():
        for _ in range(count):
            policy.transformer(**inputs)


def _forwards_and_backwards(policy: Policy, inputs: Mapping[str, Any], count: int) -> None:
    for _ in range(count):
        policy.transformer(**inputs)[0].square().mean().backward()
    policy.optimizer.zero_grad()


def _products(policy: Policy, inputs: Mapping[str, Any], count: int) -> None:
    """One forward and PROBES products with its Jacobian in x each."""
    import torch

    x = inputs["hidden_states"].detach().requires_grad_()
    for _ in range(count):
        v = policy.transformer(**{**inputs, "hidden_states": x})[0]
        for _ in range(PROBES):
            torch.autograd.grad(v, x, torch.ones_like(v), retain_graph=True)


def _inputs(policy: Policy, size: int) -> dict[str, Any]:
    """What the tiny SD3's transformer takes, for so many images."""
    import torch

    embeds = policy.encode(["a sneaker"] * size)
    return {
        "hidden_states": torch.randn(size, *policy.latent_shape, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((size,), 500.0),
        "encoder_hidden_states": embeds.prompt_embeds,
        "pooled_projections": embeds.pooled_prompt_embeds,
        "return_dict": False,
    }


# --- all of them ------------------------------------------------------------------------------------------


def measured_by(tree: Path, name: str, rounds: int) -> Timed | None:
    """A case, timed in a process with the package of a tree; None where that tree does not know one of its settings."""
    from flow_grpo.errors import ConfigError

    command = [sys.executable, __file__, "--case", name, "--rounds", str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Timed(**json.loads(done.stdout.splitlines()[-1]))
    end = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if tree != ROOT and end.startswith("KeyError"):
        return None
    raise ConfigError(f"{name} in {tree}: {end}")


def compare(names: Sequence[str], rounds: int, other: Path | None) -> list[dict[str, Any]]:
    """A row a case; beside another tree each is timed twice by both, in turn, and the quicker one counts."""
    rows = []
    for name in names:
        trees = [ROOT] if other is None else [ROOT, other, ROOT, other]
        timed = [measured_by(tree, name, rounds) for tree in trees]
        here = _quickest(timed[::2] if other else timed)
        there = _quickest(timed[1::2]) if other else None
        rows.append({"case": name, "here": here, "other": there})
        print(f"{name:<24} {json.dumps(here)}", flush=True)
    return rows


def _quickest(found: Sequence[Timed | None]) -> dict[str, Any] | None:
    known = [one for one in found if one is not None]
    best = min(known, key=lambda one: one.seconds, default=None)
    return None if best is None else asdict(best) | {"images_per_second": best.images_per_second}


def table(results: Mapping[str, Any]) -> str:
    """The results in words."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("speed.md.j2").render(results=results)


def main() -> int:
    """Time all cases, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of the cases alone")
    parser.add_argument("--against", metavar="COMMIT", default="", help="time this commit, too")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[*CASES, *SCALES], default=[])
    parser.add_argument("--rounds", type=int, default=0, help=f"pairs of a case (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--case", choices=[*CASES, *SCALES], help=argparse.SUPPRESS)  # what a process is asked for
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if arguments.case:
        print(json.dumps(asdict(measure({**CASES, **SCALES}[arguments.case], rounds))))
        return 0
    write(arguments, rounds)
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """What makes the results again, wherever they are written."""
    against = f" --against {arguments.against}" if arguments.against else ""
    only = "".join(f" {name!r}" for name in arguments.only)
    return f"python scripts/bench/speed.py{' --quick' * arguments.quick}{against}{' --only' * bool(only)}{only}"


def write(arguments: argparse.Namespace, rounds: int) -> None:
    """Time what was asked for, and write results and table."""
    from flow_grpo.commands.cli import one_sentence_errors
    from flow_grpo.files import strict_json, write_atomically
    from scripts.bench.golden import worktree
    from scripts.bench.machine import cpu_model

    names = arguments.only or [*CASES, *(() if arguments.quick else SCALES)]
    load = os.getloadavg()[0]
    with one_sentence_errors(), tempfile.TemporaryDirectory() as place:
        tree = worktree(arguments.against, Path(place, "tree")) if arguments.against else nullcontext()
        with tree as other:
            rows = compare(names, rounds, other)
        results = {
            "machine": cpu_model(), "load": load, "rounds": rounds, "against": arguments.against, "rows": rows,
            "command": _command(arguments),
        }  # fmt: skip
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out / "results.json", strict_json(results, indent=1) + "\n")
        write_atomically(arguments.out / "table.md", table(results))


if __name__ == "__main__":
    sys.exit(main())
