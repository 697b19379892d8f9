"""One case of the speed bench, in a process of its own: for each line on its standard input, one round is timed.

A round is an epoch (or an evaluation, or log-densities) and then its calls alone; what a round took is a line of
standard output. The parent lets processes of several trees take turns so. Started from another tree, this file times
that tree's package: it asks for nothing there but what every tree has since methods are in a registry.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from scripts.bench.speed_cases import ALL, PROBES, Case

if TYPE_CHECKING:
    from flow_grpo.policy import Policy

MARK = "TIMED "
Work = Callable[[], object]


def cpu_seconds(work: Work) -> float:
    """Of this process, while it does that."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


class Worker:
    """What is timed of one case: `parts`, by the name of their column."""

    def __init__(self, case: Case, policy: Policy, reward: Any, work: Work, images: int) -> None:
        """Run it twice: the first time is the warm-up, the second one is counted."""
        self.case, self.policy, self.reward, self.images = case, policy, reward, images
        first = cpu_seconds(work)
        policy.network_evaluations = policy.trained_evaluations = 0
        self.first = first - cpu_seconds(work)
        self.trained = getattr(policy, "trained_evaluations", 0)  # older trees count forwards alone
        self.evaluations = policy.network_evaluations
        self.parts: dict[str, Work] = {"seconds": work}

    def add_calls(self, prompts: list[str], judge: Any, compiled: bool, upstream: bool) -> None:
        """The calls of its models alone, and whatever else is compared with; each is run once."""

        def network() -> None:
            with self._eager():
                self._network(self.policy.transformer)

        self.parts["network"] = network
        if self.case.what != "entropy":
            self.parts["scoring"] = self._scoring(prompts, judge)
        if compiled:
            self.parts["compiled"] = self._compiled()
        if upstream:
            self.parts["upstream"] = self._upstream(prompts)
        for name, work in self.parts.items():
            if name != "seconds":
                work()

    def _compiled(self) -> Work:
        import torch

        fast = torch.compile(copy.deepcopy(self.policy.transformer), dynamic=False)

        def best() -> None:
            with self._eager():  # blocks that the package compiled stay out of it
                self._network(fast)

        return best

    def _upstream(self, prompts: list[str]) -> Work:
        from scripts.bench.speed_upstream import Upstream

        loop = Upstream(self.policy, self.reward, prompts)

        def theirs() -> None:
            with self._eager():
                loop.epoch()

        return theirs

    def _eager(self) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = getattr(self.policy, "eager", nullcontext)()  # older trees have none
        return found

    def round(self) -> dict[str, float]:
        """CPU seconds of each part, one after the other."""
        return {name: cpu_seconds(work) for name, work in self.parts.items()}

    def _network(self, network: Any) -> None:
        """As many calls as were counted, with and without backward pass, on batches of the case's sizes."""
        config, what = self.policy.settings.config, self.case.what
        halves = 2 if config.sample.guidance_scale != 1 else 1
        share = self.images if what != "epoch" else self.policy.settings.plan.images_per_process
        sizes = {"evaluation": config.eval.batch_size, "entropy": config.entropy.batch_size}
        drawn = config.train.batch_size if config.use_reward_gradient else config.sample.batch_size
        without = halves * min(sizes.get(what, drawn), share)
        trained = halves * config.train.batch_size
        if what == "epoch":
            trained = halves * min(config.train.batch_size, self.policy.settings.plan.images_per_update)
        if what == "entropy":
            _products(network, inputs(self.policy, without), self.trained // without)
            return
        _forwards(network, inputs(self.policy, without), (self.evaluations - self.trained) // without)
        _trained(network, inputs(self.policy, trained), self.trained // trained)
        self.policy.optimizer.zero_grad()

    def _scoring(self, prompts: list[str], judge: Any) -> Work:
        """Decoder, rewards and judge, on the case's batches; with their gradient where the method follows it."""
        import torch

        policy, config = self.policy, self.policy.settings.config
        gradient = self.case.what == "epoch" and config.use_reward_gradient
        size = config.eval.batch_size if self.case.what == "evaluation" else config.sample.batch_size
        if gradient:
            size = config.train.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]

        def work() -> None:
            for batch in batches:
                latents = torch.randn(len(batch), *policy.latent_shape, requires_grad=gradient)
                with torch.set_grad_enabled(gradient):
                    images = policy.decode(latents)
                    total = self.reward(images, batch, [{} for _ in batch]).total
                    if judge is not None:
                        judge.image_features(images)
                if gradient:
                    torch.autograd.grad(total.sum(), latents)

        return work


def _forwards(network: Any, arguments: Mapping[str, Any], count: int) -> None:
    import torch

    with torch.no_grad():
        for _ in range(count):
            network(**arguments)


def _trained(network: Any, arguments: Mapping[str, Any], count: int) -> None:
    for _ in range(count):
        network(**arguments)[0].square().mean().backward()


def _products(network: Any, arguments: Mapping[str, Any], count: int) -> None:
    """One forward and PROBES products with its Jacobian in x each."""
    import torch

    x = arguments["hidden_states"].detach().requires_grad_()
    for _ in range(count):
        v = network(**{**arguments, "hidden_states": x})[0]
        for _ in range(PROBES):
            torch.autograd.grad(v, x, torch.ones_like(v), retain_graph=True)


def inputs(policy: Policy, size: int) -> dict[str, Any]:
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


def _reward_of(config: Any, device: Any) -> Any:
    """The rewards of a configuration, also in a tree before they were built in a module of its own."""
    try:
        from flow_grpo.rewards.building import build_reward
    except ModuleNotFoundError:
        from flow_grpo.rewards import build_reward  # type: ignore[attr-defined,no-redef]
    return build_reward(config, device)


@contextmanager
def worker_of(case: Case, alone: bool = False) -> Iterator[Worker]:
    """A worker, once everything in it is warm. `alone`: what is timed, without the calls of its models."""
    import torch
    from accelerate import Accelerator

    from flow_grpo import places
    from flow_grpo.methods.registry import method_of
    from flow_grpo.policy import Policy
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import resolve

    try:
        from flow_grpo.recipes.registry import get_config
    except ModuleNotFoundError:  # an older tree
        from config.grpo import get_config

    torch.set_num_threads(1)
    config, processes = get_config(case.recipe), int(os.environ.get("WORLD_SIZE", "1"))
    config.update_from_flattened_dict({"num_processes": 0, **case.changes})
    with tempfile.TemporaryDirectory() as folder:
        config.logdir, config.run_name, config.trackers = os.environ.get("SPEED_LOGDIR", folder), "run", ()
        accelerator = Accelerator(cpu=True)
        settings = resolve(config, processes, cuda=False)
        with Run(settings, accelerator) as run:
            policy, reward = Policy.load(settings, accelerator), _reward_of(settings.config, accelerator.device)
            prompts = PromptDataset.load(config.prompts.train)
            judge: Any = None
            if case.what == "epoch":
                loop = places.load(method_of(settings.config).loop)
                images = settings.plan.images
                size = config.sample.num_image_per_prompt
                texts = [text for text in prompts.prompts for _ in range(size)]
                texts = (texts * (images // len(texts) + 1))[: images // processes]

                def work() -> None:
                    loop(policy, prompts, reward, settings, run)
                    run.counters.epoch += 1

            elif case.what == "evaluation":
                from flow_grpo.evaluators.evaluation import evaluate, sample_evaluators

                evaluators = sample_evaluators(reward, settings, policy.device)
                judge = next((e.scorer for e in evaluators if hasattr(e, "scorer")), None)
                tested = PromptDataset.load(config.prompts.test)
                texts = [text for text in tested.prompts for _ in range(config.eval.num_image_per_prompt)]
                images = len(texts)

                def work() -> None:
                    evaluate(policy, tested, evaluators, settings, run, "eval")

            else:
                from flow_grpo.evaluators.entropy import prompt_log_densities

                chosen = tuple(prompts.prompts[: config.entropy.num_prompts])
                texts = [text for text in chosen for _ in range(config.entropy.num_image_per_prompt)]
                images = len(texts)

                def work() -> None:
                    prompt_log_densities(policy, chosen, run)

            worker = Worker(case, policy, reward, work, images)
            if not alone:
                worker.add_calls(texts, judge, case.compiled, case.upstream)
            yield worker
        accelerator.end_training()


def main() -> int:
    """Serve one case: a line that says what it is, then one for each that is read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(ALL))
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    with worker_of(ALL[arguments.case], arguments.alone) as worker:
        told = {key: getattr(worker, key) for key in ("images", "evaluations", "trained", "first")}
        print(MARK + json.dumps(told), flush=True)
        for _ in sys.stdin:
            print(MARK + json.dumps(worker.round()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
