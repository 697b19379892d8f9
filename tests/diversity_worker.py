"""Run by test_processes.py on one or two processes: the diversity of one evaluation, one image at a time, saved."""

import json
import sys
from pathlib import Path

from flow_grpo.evaluators.diversity import build_diversity_evaluators
from flow_grpo.evaluators.evaluation import evaluate, sample_evaluators
from flow_grpo.launch import launch
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.base import get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run


def main(models: str, out: str) -> None:
    config = get_config()
    config.logdir, config.run_name, config.trackers = f"{out}-logs", "run", ()
    config.pretrained.model, config.reward_fn.pickscore = f"{models}/sd3", 1.0
    config.prompts.train = config.prompts.test = config.prompts.eval_diversity = f"{models}/prompts.txt"
    config.reward_model.pickscore, config.eval.judge, config.eval.modes = f"{models}/clip", f"{models}/judge", ""
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.num_steps = 1, 1, 2
    config.eval_diversity, config.diversity.model, config.diversity.num_prompts = True, f"{models}/judge", 3
    config.num_seeds, config.eval.batch_size = 5, 1
    settings, accelerator = launch(config)
    policy, run = Policy.load(settings, accelerator), Run(settings, accelerator)
    evaluators = sample_evaluators(build_reward(settings.config, accelerator.device), settings, accelerator.device)
    evaluators += build_diversity_evaluators(settings, run, accelerator.device)
    metrics = evaluate(policy, PromptDataset.load(config.prompts.test), evaluators, settings, run, "eval").metrics
    if run.is_main:
        counts = json.loads((run.folder / "diversity/eval_000000.json").read_text())["counts"]
        record = json.loads((run.folder / "evaluations/eval_000000.json").read_text())
        sprite = (run.folder / "evaluations/eval_000000.webp").read_bytes().hex()
        Path(out).write_text(json.dumps({"metrics": metrics, "counts": counts, "record": record, "sprite": sprite}))
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
