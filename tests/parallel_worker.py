"""Run by test_parallel.py on three processes: the same trainings with replicated weights and with sharded ones."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from ml_collections import ConfigDict

from flow_grpo import places
from flow_grpo.entropy import NonFiniteError
from flow_grpo.evaluators.entropy import prompt_log_densities
from flow_grpo.evaluators.evaluation import evaluate
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.launch import launch
from flow_grpo.methods.registry import method_of
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.registry import get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.run import Run
from flow_grpo.settings import resolve
from flow_grpo.training.performance import flops_per_evaluation
from flow_grpo.training.state import collect, gathered, restore

EPOCHS = 2
OTHER_FAMILIES = ("qwen_image",)


# --- what is trained ------------------------------------------------------------------------------------


def guided(config: ConfigDict) -> None:
    """Two passes of DRTune under guidance, held to the base's velocity; then all that is evaluated."""
    config.drtune.two_pass, config.sample.guidance_scale, config.train.beta = True, 2.0, 0.1
    config.eval_ode_log_prob = config.eval_forward_kl = config.visualize_steps = True


def full(config: ConfigDict) -> None:
    """All weights, with a frozen copy of them; activations are computed again."""
    config.use_lora, config.train.beta, config.gradient_checkpointing = False, 0.1, True


def uneven(config: ConfigDict) -> None:
    """Only bad images teach, not as many on every process; frozen weights in bf16."""
    config.train.advantage_mode, config.mixed_precision = "negative", "bf16"


def averaged(config: ConfigDict) -> None:
    """Old weights that are an average, and make the images."""
    config.forward.old, config.forward.old_decay, config.forward.old_decay_ramp = "ema", 0.5, 0.0


def of_family(config: ConfigDict) -> None:
    """GRPO under guidance on another family's model, an image each."""
    config.sample.guidance_scale, config.sample.num_steps, config.max_sequence_length = 2.0, 2, 64
    config.sample.groups_per_epoch = 1


Change = Callable[[ConfigDict], None]
TRAININGS: dict[str, tuple[str, Change]] = {
    "guided": ("drtune", guided),
    "full": ("grpo", full),
    "uneven": ("grpo", uneven),
    "averaged": ("nft", averaged),
    **dict.fromkeys(OTHER_FAMILIES, ("grpo", of_family)),
}


def swapped(policy: Policy) -> None:
    """Old weights take the parameters' place, as where they are replicated; the network goes on with the others."""

    def swap(values: Any) -> None:
        for parameter, value in zip(policy.trainable, values, strict=True):
            parameter.data = value

    policy._set_trainable = swap  # type: ignore[method-assign]


def unreduced(policy: Policy) -> None:
    """Gradients stay where they are found."""
    policy.transformer.set_requires_gradient_sync(False)


BROKEN: dict[str, tuple[str, Callable[[Policy], None]]] = {
    "swapped": ("averaged", swapped),
    "unreduced": ("uneven", unreduced),
}


def configuration(name: str, models: str, logdir: str, run_name: str) -> ConfigDict:
    """9 images an epoch, one at a time; 7 are evaluated, of which 5 for their entropy."""
    method, change = TRAININGS[name]
    config = get_config(f"tiny_{method}")
    config.logdir, config.run_name, config.trackers = logdir, run_name, ()
    config.pretrained.model, config.reward_model.pickscore = f"{models}/sd3", f"{models}/clip"
    if name in OTHER_FAMILIES:
        config.pretrained.model = f"{models}/{name}"
    config.prompts.train = config.prompts.test = f"{models}/prompts.txt"
    config.eval.judge, config.eval.modes, config.eval_diversity = "", "", False
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.batch_size = 1, 7, 1
    config.eval.num_steps, config.entropy.num_image_per_prompt, config.entropy.batch_size = 2, 5, 1
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 3, 3
    config.sample.batch_size = config.train.batch_size = 1
    config.sample.num_steps, config.train.updates_per_epoch, config.drtune.num_train_steps = 3, 1, 2
    change(config)
    return config


# --- what is found --------------------------------------------------------------------------------------


def velocities(policy: Policy) -> dict[str, torch.Tensor]:
    """Of the trained and of the base weights, with a product of the base's Jacobian, at one point."""
    draws = torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    x, a = draws.unbind()
    embeds = policy.encode(["a bag", "a boot"])
    with torch.no_grad():
        tuned = policy.velocity(embeds, 2.0)(x, 0.5)
    base, product = policy.reference_product(embeds, 2.0)(x, 0.5, a)
    return {"tuned": tuned, "base": policy.reference_velocity(embeds, 2.0)(x, 0.5), "again": base, "product": product}


def stops_together(policy: Policy, run: Run) -> bool:
    """Whether one process whose velocity is not finite ends the log-densities of all."""
    found = policy.family.velocity
    if policy.accelerator.process_index == 1:
        policy.family.velocity = lambda *arguments: torch.nan * found(*arguments)
    try:
        prompt_log_densities(policy, ("a bag",), run)
    except NonFiniteError:
        return True
    finally:
        policy.family.velocity = found
    return False


def eight_bits(models: str, logdir: str, accelerator: Any) -> dict[str, Any]:
    """Two epochs of all weights with moments of 8 bits, and the second again from the first's state of the main one.

    What each process holds at the end, and what it holds after going on.
    """
    config = configuration("full", models, logdir, "eight_bits")
    config.train.beta, config.train.optimizer, config.gradient_checkpointing = 0.0, "adamw_8bit", False
    settings = resolve(config, accelerator.num_processes, cuda=False)
    run, reward = Run(settings, accelerator), build_reward(settings.config, accelerator.device)
    prompts = PromptDataset.load(config.prompts.train)
    policy = Policy.load(settings, accelerator)
    epoch = places.load(method_of(settings.config).loop)
    epoch(policy, prompts, reward, settings, run)
    run.counters.epoch += 1
    between = [gathered(policy, collect(policy, run, evaluated=True).to_cpu())]
    epoch(policy, prompts, reward, settings, run)
    unbroken = collect(policy, run, evaluated=True).to_cpu().tensors
    policy = Policy.load(settings, accelerator)
    (state,) = broadcast_object_list(between)
    restore(policy, run, state, "between")
    epoch(policy, prompts, reward, settings, run)
    resumed = collect(policy, run, evaluated=True).to_cpu().tensors
    return {"unbroken": gather_object([unbroken]), "resumed": gather_object([resumed]), "between": state.tensors}


def main(models: str, out: str) -> None:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    accelerator = None
    runs = [(name, "none", None) for name in TRAININGS] + [(name, "full", None) for name in TRAININGS]
    runs += [(name, twin, spoil) for twin, (name, spoil) in BROKEN.items()]
    for name, kind, spoil in runs:
        config = configuration(name, models, f"{out}-logs", f"{name}_{kind}")
        config.sharding = "none" if kind == "none" else "full"
        if accelerator is None:
            settings, accelerator = launch(config)
        else:
            settings = resolve(config, accelerator.num_processes, cuda=False)
        policy, prompts = Policy.load(settings, accelerator), PromptDataset.load(config.prompts.train)
        run, reward = Run(settings, accelerator), build_reward(settings.config, accelerator.device)
        if spoil is not None:
            spoil(policy)
        here: dict[str, Any] = {}
        for _ in range(EPOCHS):
            metrics = places.load(method_of(settings.config).loop)(policy, prompts, reward, settings, run)
            run.counters.epoch += 1
        here |= {"metrics": metrics, "evaluations": gather_object([policy.network_evaluations])}
        if name == "guided":
            evaluators = build_evaluators(policy, reward, settings, run)
            here |= velocities(policy) | {"flops": flops_per_evaluation(policy)}
            here["evaluated"] = dict(evaluate(policy, prompts, evaluators, settings, run, "eval").metrics)
            here["drawn"] = sorted(path.name for path in (run.folder / "images").glob("*"))
            here["stopped"] = gather_object([stops_together(policy, run)])
        state = gathered(policy, collect(policy, run, evaluated=True))
        if state is not None:
            found[name, kind] = here | {"tensors": dict(state.tensors)}
    found["full", "eight_bits"] = eight_bits(models, f"{out}-logs", accelerator)
    if run.is_main:
        torch.save(found, out)
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
