"""Runs of seconds for scripts/bench/faults.py: the random tiny models, the unbroken runs, and what is compared."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flow_grpo.errors import ConfigError
from flow_grpo.runs.folder import EARLIER, HISTORY_FILE, RECORD_FOLDERS
from flow_grpo.runs.history import read_history
from flow_grpo.runs.saved import CHECKPOINTS, TENSORS, checkpoint_damage, checkpoint_state, finished_checkpoints
from scripts.bench.faults_processes import LOST, OTHER, SAVING, Calls, Result, Session
from scripts.tiny import models as tiny_models

PROMPTS = ("a bag", "a boot", "a red coat", "a sandal")
EPOCHS = 4
CLOCK = re.compile(rb'"seconds": [^,]*|"sha256": "[^"]*"')  # in the record of an evaluation, and the digest of it
LITTER = (".partial-*", ".stale-*", ".dropped-*", "*.tmp")


@dataclass(frozen=True)
class Kind:
    """What is trained."""

    loop: str = "grpo"  # or "drtune"
    processes: int = 1
    lora: bool = True  # False: full fine-tuning
    records: bool = False  # every evaluator's files besides
    more: bool = False  # an epoch less, which is done when the run goes on, and every checkpoint kept

    @property
    def epochs(self) -> int:
        """Of the unbroken run."""
        return EPOCHS - 1 if self.more else EPOCHS

    def __str__(self) -> str:
        return f"{self.loop} x {self.processes}{'' if self.lora else ', full'}"


@dataclass(frozen=True)
class Reference:
    """An unbroken run."""

    folder: Path
    seconds: float
    calls: int  # on the file system, of its longest checkpoint


# --- the laboratory -------------------------------------------------------------------------------------


@dataclass
class Lab:
    """A temporary folder with random tiny models and the unbroken runs."""

    folder: Path
    references: dict[Kind, Reference] = field(default_factory=dict)

    def build(self) -> None:
        """Write sd3/, clip/, prompts.txt: random weights, output layers included, so that every input matters."""
        torch.set_num_threads(1)
        sizes: dict[str, Any] = {"vae_channels": (8, 16, 16), "text_width": 16, "width": 32, "heads": 2, "layers": 2}
        pipeline = tiny_models.build_pipeline(0, **sizes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pipeline.transformer.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        pipeline.save_pretrained(self.folder / "sd3")
        for part in tiny_models.build_clip(0, vision_width=32, vision_layers=2, vision_heads=2):
            part.save_pretrained(self.folder / "clip")
        (self.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        for path in [self.folder, *self.folder.rglob("*")]:  # read by trials under another user
            path.chmod(0o755 if path.is_dir() else 0o644)

    def beginning(self, kind: Kind, run: Path) -> list[str]:
        """The arguments that begin a run in a folder."""
        clip, prompts = self.folder / "clip", self.folder / "prompts.txt"
        values: dict[str, Any] = {
            "logdir": run.parent, "run_name": run.name, "trackers": (), "num_epochs": kind.epochs, "save_freq": 1,
            "pretrained.model": self.folder / "sd3", "prompts.train": prompts, "prompts.test": prompts,
            "prompts.eval_diversity": prompts, "reward_model.pickscore": clip, "reward_model.clipscore": clip,
            "diversity.model": clip, "num_seeds": 4, "eval.judge": clip, "eval.modes": "",
            "eval.num_image_per_prompt": 2, "lora.rank": 4, "num_checkpoint_limit": 2, "use_lora": kind.lora,
            "eval.num_steps": 2, "eval_freq": 2, "eval_diversity": True, "eval_diversity_freq": 2,
            "sample.groups_per_epoch": 4, "sample.num_image_per_prompt": 2, "sample.batch_size": 4,
            "train.batch_size": 4, "train.updates_per_epoch": 2, "drtune.num_train_steps": 2, "sample.num_steps": 4,
        }  # fmt: skip
        if kind.records:
            values |= {"visualize_steps": True, "visualize_steps_freq": 2, "entropy.num_image_per_prompt": 2}
            values |= {"eval_ode_log_prob": True, "eval_ode_log_prob_freq": 2, "entropy.num_probes": 1}
        if kind.more:
            values |= {"num_checkpoint_limit": 0}
        recipe = "tiny_sd3_use_gradient" if kind.loop == "drtune" else "tiny_sd3"
        return [f"--config=config/grpo.py:{recipe}", *(f"--config.{key}={value}" for key, value in values.items())]

    def refer(self, kind: Kind) -> None:
        """Make the unbroken run of a kind."""
        run, counts = self.folder / "unbroken" / str(len(self.references)), self.folder / "counts.txt"
        run.parent.mkdir(exist_ok=True)
        result, start = Result("unbroken", 0, str(kind)), time.monotonic()

        def note(count: int) -> None:
            with counts.open("a", encoding="utf-8") as file:
                file.write(f"{count}\n")

        def before() -> None:
            Calls(SAVING, lambda number: None, note)

        session = Session(self.beginning(kind, run), run.with_suffix(".log"), kind.processes, before=before)
        if any(session.ends(result)) or result.faults:
            raise RuntimeError(f"the unbroken run of {kind} failed:\n{result.log}")
        calls = max(map(int, counts.read_text(encoding="utf-8").split()), default=0)
        self.references[kind] = Reference(run, time.monotonic() - start, calls)


def resuming(run: Path, *more: str) -> list[str]:
    """The arguments that go on with a run."""
    return [f"--config.resume_from={run}", *more]


# --- what is left ---------------------------------------------------------------------------------------


def sentences(said: str) -> int:
    """How many errors a process has told."""
    return len(re.findall(r"(?:^|[\r\]])error: ", said, flags=re.MULTILINE))  # a bar may stand before it


def newest_whole(run: Path) -> int:
    """The epoch of the newest whole checkpoint, every byte compared; -1: there is none.

    One that was about to be replaced still counts: it comes back when the run goes on.
    """
    checkpoints = run / CHECKPOINTS
    found = list(finished_checkpoints(checkpoints).values()) + list(checkpoints.glob(".stale-checkpoint-*"))
    whole = [path for path in found if checkpoint_damage(path, deep=True) is None]
    return max((int(checkpoint_state(path)["counters"]["epoch"]) for path in whole), default=-1)


def is_evaluated(run: Path, epoch: int) -> bool:
    """Whether the evaluation that was due at a whole checkpoint had been made before it was written."""
    return bool(checkpoint_state(run / CHECKPOINTS / f"checkpoint-{epoch:06d}").get("evaluated", True))


def damaged(run: Path) -> list[str]:
    """The checkpoints under their own names that are not whole."""
    found = finished_checkpoints(run / CHECKPOINTS).values()
    return [f"{path.name}: {problem}" for path in found if (problem := checkpoint_damage(path, deep=True))]


def litter(run: Path) -> list[str]:
    """What an interrupted write has left, but for what was set aside with it."""
    found = (path.relative_to(run) for pattern in LITTER for path in run.rglob(pattern))
    return [str(path) for path in found if not path.parts[0].startswith(f"{EARLIER}-")]


def history(run: Path) -> list[dict[str, Any]]:
    """The metrics, less the clock's."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_history(run / HISTORY_FILE)]


def last_tensors(run: Path) -> bytes:
    """Of the newest checkpoint: weights, average, optimizer."""
    folder = list(finished_checkpoints(run / CHECKPOINTS).values())[-1]
    return folder.name.encode() + (folder / TENSORS).read_bytes()


def records(run: Path) -> dict[str, bytes]:
    """The evaluators' own files, less the clock's reading, by their paths in the run."""
    files = [file for folder in RECORD_FOLDERS for file in (run / folder).glob("*.json")]
    return {file.relative_to(run).as_posix(): CLOCK.sub(b"", file.read_bytes()) for file in files}


def differences(run: Path, unbroken: Path, without: str = "") -> list[str]:
    """How a run that was broken and went on differs from the unbroken one, in words; one record may be left out."""
    ours, theirs = records(run), records(unbroken)
    other = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name) and Path(name).name != without)
    found_tensors = [] if last_tensors(run) == last_tensors(unbroken) else ["other tensors"]
    found_records = [f"other records {other}"] if other else []
    return [*found_tensors, *other_metrics(run, unbroken), *found_records]


def other_metrics(run: Path, unbroken: Path, prefix: bool = False) -> list[str]:
    """How the metrics differ, in words; `prefix`: the run may have come further."""
    try:
        ours, theirs = history(run), history(unbroken)
    except ConfigError as error:
        return [f"metrics cannot be read: {error}"]
    if ours == theirs or (prefix and ours[: len(theirs)] == theirs):
        return []
    shapes = [
        [f"{line['step']}{'e' * any('eval' in name for name in line)}" for line in lines] for lines in (ours, theirs)
    ]
    return [f"other metrics: {' '.join(shapes[0])} instead of {' '.join(shapes[1])}"]


def finish(session: Session, run: Path, unbroken: Path, result: Result) -> None:
    """The last start of a trial, which nothing breaks: it ends well and like the unbroken run."""
    codes = session.ends(result)
    if any(codes):
        result.add(LOST, f"the last start ended with {codes}")
    elif different := differences(run, unbroken):
        result.add(LOST, "; ".join(different))
    elif left := litter(run):
        result.add(OTHER, f"left {left}")


@contextmanager
def trial_folder(lab: Lab, result: Result) -> Iterator[Path]:
    """A folder for one trial, which goes unless something went wrong."""
    folder = lab.folder / result.part / str(result.number)
    folder.mkdir(parents=True)
    yield folder
    if not result.faults:
        shutil.rmtree(folder, ignore_errors=True)
