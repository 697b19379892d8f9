"""Run by test_resume_processes.py on any number of processes: every loop goes on to an epoch, in one launch.

That each method goes on bit for bit, on one process, is tested in tests/training/test_checkpoint.py.
"""

import sys

from flow_grpo import places
from flow_grpo.evaluators.diversity import build_diversity_evaluators
from flow_grpo.evaluators.evaluation import Evaluator, sample_evaluators
from flow_grpo.launch import launch
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.policy import Policy
from flow_grpo.prompts import training_prompts
from flow_grpo.recipes.registry import get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.settings import resolve
from flow_grpo.training import checkpoint
from flow_grpo.training.trainer import fit

LOOPS = {method.loop.split(":")[0]: name for name, method in reversed(METHODS.items())}  # module -> its first method
CASES = {  # name -> (method, LoRA)
    **{name: (name, True) for name in reversed(LOOPS.values())},
    "grpo_full": ("grpo", False),
    "drtune_full": ("drtune", False),
}
DRAWN = {"grpo_full": "weighted", "drtune_full": "balanced"}  # how prompts are drawn; the learning rate has a schedule
EVALUATED = "grpo"  # the one that is evaluated after every epoch
SHARDED = ("grpo", "nft", "grpo_full")  # whose broken runs are made with sharded weights too


def configuration(case: str, models: str, out: str, run_name: str, epochs: int):
    """12 images an epoch: 1, 2 and 3 processes divide them."""
    method, lora = CASES[case]
    config = get_config(f"tiny_{method}")
    config.use_lora = lora
    config.logdir, config.run_name, config.trackers = out, run_name, ()
    config.pretrained.model, config.reward_fn.pickscore = f"{models}/sd3", 1.0
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.reward_model.pickscore, config.eval.judge, config.eval.modes = f"{models}/clip", "", ""
    config.num_epochs, config.save_freq, config.eval_freq = epochs, 1, 0
    config.eval_diversity = case == EVALUATED
    if case == EVALUATED:
        config.prompts.eval_diversity, config.eval.judge = config.prompts.test, f"{models}/judge"
        config.eval_freq = config.eval_diversity_freq = 1
        config.num_seeds, config.eval.num_image_per_prompt, config.diversity.model = 8, 3, f"{models}/judge"
        config.eval.num_steps, config.eval.ema = 2, False
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 3, 4
    config.sample.batch_size, config.train.batch_size, config.train.updates_per_epoch = 4, 4, 2
    config.sample.num_steps, config.drtune.num_train_steps = 3, 2
    config.drtune.early_stop = min(config.drtune.early_stop, 2)
    config.anchored.base_images, config.anchored.base_prompts = (4, 3) if method == "anchored" else (64, 16)
    config.train.learning_rate = 1e-4
    if case in DRAWN:
        config.prompts.train, config.sample.prompt_sampling = f"{out}/prompts.jsonl", DRAWN[case]
        config.train.update({"lr_scheduler": "cosine", "lr_warmup_steps": 2, "lr_total_steps": 20})
    return config


def main(models: str, out: str, name: str, first: str, last: str) -> None:
    """Each case's run `<name>_<case>`, from epoch `first` to `last`; of broken ones, some as `sharded_<case>` too."""
    accelerator = None
    runs = [(name, case) for case in CASES] + [("sharded", case) for case in SHARDED if name == "broken"]
    for kind, case in runs:
        run_name = f"{kind}_{case}"
        config = configuration(case, models, out, run_name, int(last))
        config.sharding = "full" if kind == "sharded" else "none"
        if int(first) > 0:
            config.resume_from = f"{out}/{run_name}"
        if accelerator is None:
            settings, accelerator = launch(config)
        else:
            settings = resolve(config, accelerator.num_processes, cuda=False)
        prompts = training_prompts(settings.config)
        run = Run(settings, accelerator)
        policy = Policy.load(settings, accelerator)
        due = checkpoint.resume(policy, run, settings)
        assert run.counters.epoch == int(first)
        reward = build_reward(settings.config, accelerator.device)
        evaluators: list[Evaluator] = []
        if case == EVALUATED:
            evaluators += sample_evaluators(reward, settings, accelerator.device)
            evaluators += build_diversity_evaluators(settings, run, accelerator.device)
        fit(
            policy,
            places.load(method_of(settings.config).loop),
            prompts,
            prompts,
            reward,
            evaluators,
            settings,
            run,
            due,
        )
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
