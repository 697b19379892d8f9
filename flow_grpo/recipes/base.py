"""Every configuration key, once: default, what is allowed, meaning. Recipes in sd3.py say only what differs.

The defaults are the embedded tiny SD3 on two CPU cores; `flow_grpo.settings.resolve` checks every value, and
`fme ls keys` prints this table, as docs/configuration.md does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.methods.registry import METHODS
from flow_grpo.models.registry import ATTENTIONS
from flow_grpo.rewards.own_files import announced
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rules import (
    BELOW_ONE,
    FILLED,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    YES_OR_NO,
    Key,
    Rule,
    choice,
    colour,
    each,
    folder,
    number,
    whole,
)

ENDLESS = 100_000  # epochs, of a run that the clock is meant to end
DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial")  # schedules that need to know their end
SCHEDULES = ("constant", "constant_with_warmup", *DECAYING)


def _of_methods() -> dict[str, tuple[Key, ...]]:
    """The settings that only some methods read, by a title that names them."""
    found: dict[tuple[Key, ...], list[str]] = {}
    for method in METHODS.values():
        found.setdefault(method.keys, []).append(method.title)
    return {f"{', '.join(titles)} only": keys for keys, titles in found.items() if keys}


SECTIONS: dict[str, tuple[Key, ...]] = {
    "the run": (
        Key(
            "run_name",
            "",
            folder("a folder under config.logdir"),
            "folder under logdir; empty: recipe name and the time of day",
        ),
        Key("recipe", "", folder("a name", 200), "name of the recipe, set by itself"),
        Key("logdir", "logs", folder("a folder"), "where run folders are written"),
        Key("project", "flow-matching-entropy", FILLED, "project name for wandb"),
        Key(
            "trackers",
            ("tensorboard",),
            each(choice("wandb", "tensorboard"), 'a tuple of "wandb" and "tensorboard", or ()'),
            'any of "wandb", "tensorboard"; metrics.jsonl is always written',
        ),
        Key("seed", 42, whole(0), "every random number is keyed by it"),
        Key("num_epochs", 100, whole(1), "stop after so many epochs"),
        Key(
            "max_seconds",
            0.0,
            NOT_NEGATIVE,
            "stop after so many seconds of training, evaluation not counted; 0: no limit",
        ),
        Key("num_processes", 0, whole(0), "refuse to start on another number of processes; 0: take what is launched"),
        Key("num_threads", 0, whole(0), "CPU threads per process; 0: leave torch's choice"),
        Key("resume_from", "", TEXT, "a run folder, its checkpoints folder, or one checkpoint"),
    ),
    "how often, in epochs; 0: never": (
        Key("eval_freq", 10, whole(0), "evaluate before the first epoch, every so many, and after the last"),
        Key("eval_ode_log_prob", False, YES_OR_NO, "measure log-densities and the differential entropy of the samples"),
        Key("eval_ode_log_prob_freq", 0, whole(0), "measure them every so many epochs; 0: as eval_freq"),
        Key(
            "eval_forward_kl",
            False,
            YES_OR_NO,
            "measure how much worse the weights fit the base model's images, an alarm of hacking",
        ),
        Key("eval_diversity", True, YES_OR_NO, "measure Vendi, RKE and their company on the samples"),
        Key("eval_diversity_freq", 0, whole(0), "measure them every so many epochs; 0: as eval_freq"),
        Key(
            "num_seeds",
            16,
            whole(4, 1_000_000),
            "images of each diversity prompt; its first ones are those of the other evaluators",
        ),
        Key(
            "visualize_steps",
            False,
            YES_OR_NO,
            "draw film strips with log-density and divergence of every sampler step",
        ),
        Key("visualize_steps_freq", 0, whole(0), "draw them every so many epochs; 0: as eval_freq"),
        Key("save_freq", 10, whole(0), "write a checkpoint every so many epochs, and after the last"),
        Key(
            "num_checkpoint_limit",
            5,
            whole(0),
            "keep so many latest checkpoints, plus the best by judge or held-out reward; 0: keep all",
        ),
    ),
    "guards: end a run early, by an evaluation of the weights that the best checkpoint is chosen by": (
        Key(
            "guard.patience",
            0,
            whole(0),
            "end when judge or held-out reward has not risen in so many evaluations; 0: never",
        ),
        Key("guard.max_drop", 0.0, NOT_NEGATIVE, "end when it is more than this below its highest; 0: never"),
        Key(
            "guard.diversity_floor",
            0.0,
            BELOW_ONE,
            "end when the diversity within prompts is below this share of the base model's; 0: never",
        ),
        Key("guard.diversity", "vendi", choice("vendi", "rke"), '"vendi" or "rke": which diversity has the floor'),
    ),
    "the model": (
        Key(
            "pretrained.model", "assets/tiny_sd3", FILLED, "a diffusers pipeline of a known family: directory or hub id"
        ),
        Key("pretrained.revision", "", TEXT, "hub revision; empty: the default branch"),
        Key(
            "pretrained.lora",
            "",
            TEXT,
            "a LoRA of any trainer, .safetensors file or folder, merged into the model before it is trained",
        ),
        Key(
            "pretrained.skip",
            (),
            each(FILLED, "a tuple of names of text encoders, or ()"),
            'text encoders to do without, whose files are not read; of SD3 ("text_encoder_3",), its T5',
        ),
        Key("pretrained.vae_dtype", "fp32", choice("fp32", "bf16"), '"fp32" or "bf16": dtype of the autoencoder'),
        Key(
            "pretrained.vae_checkpointing",
            False,
            YES_OR_NO,
            "a reward's gradient decodes the image once more, block by block, and keeps less; not for Qwen-Image",
        ),
        Key(
            "pretrained.text_dtype",
            "",
            choice("", "fp32", "bf16", "fp16"),
            '"fp32", "bf16" or "fp16": dtype of the text encoders; empty: that of mixed_precision',
        ),
        Key(
            "pretrained.distilled_guidance",
            3.5,
            NOT_NEGATIVE,
            "guidance scale of models that take it as an input of the network, such as FLUX.1-dev; others ignore it",
        ),
        Key(
            "pretrained.attention",
            "",
            choice(*ATTENTIONS),
            f"diffusers' name of what computes attention: {', '.join(ATTENTIONS[1:])}; not SD3's; empty: torch chooses",
        ),
        Key(
            "pretrained.offload_text",
            False,
            YES_OR_NO,
            "text encoders come to the GPU once an epoch, for its prompts, and leave it again",
        ),
        Key("resolution", 32, whole(1), "height and width of the images, in pixels"),
        Key("height", 0, whole(0), "height of the images, in pixels; 0: that of resolution"),
        Key("width", 0, whole(0), "width of the images, in pixels; 0: that of resolution"),
        Key(
            "max_sequence_length",
            8,
            whole(1, 512),
            "tokens of a prompt: of the T5, or of the language model, whose chat template counts",
        ),
        Key(
            "mixed_precision",
            "no",
            choice("no", "bf16", "fp16"),
            '"no", "bf16" or "fp16": dtype of the frozen weights and of autocast',
        ),
        Key(
            "sharding",
            "none",
            choice("none", "full"),
            '"full": each process keeps a part of the transformer (FSDP2), for models too large for one GPU',
        ),
        Key("allow_tf32", True, YES_OR_NO, "TF32 matrix products on GPUs"),
        Key(
            "compile",
            "off",
            choice("off", "on", "auto"),
            '"on": compile the transformer, block by block, minutes at the start; "auto": where a long run pays for it',
        ),
        Key("gradient_checkpointing", False, YES_OR_NO, "recompute the transformer's activations in the backward pass"),
        Key("prompt_cache_size", 1024, whole(1), "prompts whose embeddings are kept in memory"),
        Key("use_lora", True, YES_OR_NO, "False: fine-tune every weight of the transformer"),
        Key("lora.rank", 16, whole(1), "rank of the update of each module"),
        Key("lora.alpha", 32.0, POSITIVE, "the update is scaled by alpha / rank"),
        Key(
            "lora.target_modules",
            (),
            each(FILLED, "a tuple of names of modules"),
            "ends of module names, but for modules without effect on the output; (): those of the model's family",
        ),
    ),
    "prompts": (
        Key(
            "prompts.train",
            "assets/prompts/tiny/train.txt",
            FILLED,
            'a .txt, one prompt a line, or a .jsonl: {"prompt": ..., ...}',
        ),
        Key("prompts.test", "assets/prompts/tiny/test.txt", FILLED, "prompts that are evaluated"),
        Key(
            "prompts.eval_diversity",
            "assets/prompts/tiny/eval_diversity.txt",
            FILLED,
            "prompts whose images' diversity is measured",
        ),
        Key(
            "negative_prompt",
            "",
            TEXT,
            'what guidance leads away from; a .jsonl may say "negative_prompt" of each prompt instead',
        ),
    ),
    "rewards: the training reward is the sum of weight * reward over the non-zero weights": (
        Key("reward_dtype", "fp32", choice("fp32", "bf16"), '"fp32" or "bf16": dtype of the rewards\' networks'),
        Key(
            "offload_rewards",
            False,
            YES_OR_NO,
            "the rewards' weights stay in main memory, and are copied to the GPU while images are scored",
        ),
        Key("targets.colour", "", colour("empty"), "for target_colour; empty: of each prompt, the first that it names"),
        Key("targets.brightness", 0.5, number("a number from 0 to 1", lambda x: 0 <= x <= 1), "for target_brightness"),
        *(Key(f"reward_fn.{reward.name}", 0.0, FINITE, reward.meaning) for reward in REWARDS.values()),
        *(
            Key(
                f"reward_model.{reward.name}",
                reward.model,
                TEXT,
                f"its checkpoint for {reward.name}: directory or hub id",
            )
            for reward in REWARDS.values()
            if reward.scorer
        ),
        Key(
            "reward_files",
            {},
            Rule(lambda value: isinstance(value, dict), "reward_files.NAME, FILE.py:THING, or as --reward takes it"),
            "rewards of one's own: where the code or the server of each is; its weight reward_fn.NAME is 1 at first",
        ),
        Key(
            "reward_range",
            {},
            Rule(lambda value: isinstance(value, dict), "reward_range.NAME, two numbers, as in (0, 1)"),
            "of one's own rewards: between what they must score two known images when the run begins",
        ),
        Key(
            "reward_ensemble",
            "mean",
            choice("mean", "min"),
            '"mean" or "min", over the checkpoints of a reward_model.NAME that names several, as in "A, B"',
        ),
        Key(
            "reward_normalise", False, YES_OR_NO, "in training each reward is divided by its std over all images so far"
        ),
        Key(
            "reward_constraint",
            {},
            Rule(lambda value: isinstance(value, dict), "reward_constraint.NAME, 0, or a number above 0"),
            "rewards that are held at the base model's level: how fast the weight of each grows while it is below",
        ),
        Key(
            "reward_augment",
            0.0,
            number("a number from 0 to 0.5", lambda x: 0 <= x <= 0.5),
            "in training each image is cropped by up to this share of its sides, its colours changed by as much",
        ),
    ),
    "rewards that are computed elsewhere: docs/rewards.md": (
        Key("remote.timeout", 60.0, POSITIVE, "seconds to wait for one answer of a server"),
        Key("remote.patience", 300.0, POSITIVE, "seconds of failing attempts after which the run is saved and ends"),
        Key("remote.batch_size", 16, whole(1), "images of one request"),
        Key("remote.concurrency", 4, whole(1, 256), "requests at once, of each process"),
        Key("chat.url", "", TEXT, "of the reward chat: a chat interface such as vLLM's, http://HOST:PORT/v1"),
        Key("chat.model", "", TEXT, "its name there; empty: the first that is served"),
        Key(
            "chat.question",
            "Does this image show: {prompt}? Answer yes or no.",
            FILLED,
            "what is asked about each image",
        ),
        Key(
            "chat.answer",
            "yes",
            choice("yes", "number"),
            '"yes": the score is the probability of yes; "number": the number of the answer / chat.scale',
        ),
        Key("chat.scale", 1.0, POSITIVE, "the best number that is answered"),
        Key("chat.max_tokens", 64, whole(1, 100_000), "of an answer with a number"),
    ),
    "which loop": (
        Key("use_reward_gradient", False, YES_OR_NO, "False: black-box methods such as GRPO; True: DRTune and its kin"),
        Key("train.method", "", TEXT, "a method of that family, `fme ls methods`; empty: GRPO or DRTune"),
    ),
    "sampling, during training": (
        Key("sample.num_steps", 10, whole(1, 10_000), "sampler steps"),
        Key("sample.guidance_scale", 1.0, NOT_NEGATIVE, "classifier-free guidance; 1: one forward, no guidance"),
        Key(
            "sample.sde_type",
            "sde",
            choice("ode", "sde", "dance", "cps", "memoryless"),
            '"ode", "sde", "dance", "cps" or "memoryless": flow_grpo/diffusers_patch/step.py',
        ),
        Key("sample.noise_level", 0.7, NOT_NEGATIVE, "eta of the stochastic samplers"),
        Key(
            "sample.sde_window_size",
            0,
            whole(0),
            "so many consecutive stochastic steps, which GRPO trains, the rest ODE; 0: all",
        ),
        Key(
            "sample.sde_window_range",
            (0, 0),
            each(whole(0), "two whole numbers, (first, one past the last)", low=2, high=2),
            "first and one-past-last step the window may cover; (0, 0): all",
        ),
        Key(
            "sample.sde_window_placement",
            "random",
            choice("random", "sliding"),
            'of the window: "random", drawn each epoch, or "sliding" from the noisiest steps to the last, and again',
        ),
        Key("sample.sde_window_epochs", 25, whole(1), "sliding: epochs before the window moves on"),
        Key("sample.sde_window_stride", 1, whole(1), "sliding: by how many steps it moves on"),
        Key("sample.groups_per_epoch", 10, whole(1), "prompts drawn per epoch, over all processes"),
        Key(
            "sample.prompt_sampling",
            "uniform",
            choice("uniform", "weighted", "balanced"),
            '"uniform"; "weighted": by the "weight" of each line of a .jsonl; "balanced": every category as often',
        ),
        Key("sample.prompt_category", "category", FILLED, "balanced: what a line calls the category of its prompt"),
        Key("sample.num_image_per_prompt", 8, whole(1), "group size: images per drawn prompt"),
        Key(
            "sample.batch_size",
            80,
            whole(1),
            "by rewards alone: images per forward, per process; GRPO and FDFO in bf16 and fp16: train.batch_size",
        ),
    ),
    "training, both loops": (
        Key("train.batch_size", 40, whole(1), "images per forward and backward, per process"),
        Key("train.updates_per_epoch", 2, whole(1), "optimizer steps into which an epoch's images are divided"),
        Key(
            "train.learning_rate",
            1e-3,
            number("a number from 1e-15 to 1", lambda x: 1e-15 <= x <= 1),
            "AdamW's; with a schedule, its highest",
        ),
        Key(
            "train.lr_scheduler",
            "constant",
            choice(*SCHEDULES),
            f"diffusers' schedule of the learning rate: {', '.join(SCHEDULES)}",
        ),
        Key(
            "train.lr_warmup_steps",
            0,
            whole(0),
            'optimizer updates in which the rate rises from 0, the first one\'s; not for "constant"',
        ),
        Key(
            "train.lr_total_steps",
            0,
            whole(0),
            "updates after which the schedule ends, and its last rate stays; 0: those of num_epochs",
        ),
        Key("train.lr_num_cycles", 1, whole(1), '"cosine_with_restarts": falls from the full rate to 0'),
        Key("train.lr_power", 1.0, POSITIVE, '"polynomial": of the fall'),
        Key(
            "train.optimizer",
            "adamw",
            choice("adamw", "adamw_8bit"),
            '"adamw", or "adamw_8bit": moments of 2 bytes a weight instead of 8, by bitsandbytes, the extra "8bit"',
        ),
        Key("train.adam_beta1", 0.9, BELOW_ONE, "AdamW: decay of the gradient's average"),
        Key("train.adam_beta2", 0.999, BELOW_ONE, "AdamW: decay of the average of its square"),
        Key("train.adam_weight_decay", 1e-4, number("a number from 0 to 1", lambda x: 0 <= x <= 1), "AdamW: decoupled"),
        Key("train.adam_epsilon", 1e-8, POSITIVE, "AdamW: added to the root of the average square"),
        Key("train.max_grad_norm", 1.0, POSITIVE, "gradients are clipped to this norm"),
        Key("train.beta", 0.0, NOT_NEGATIVE, "weight of the KL divergence to the reference model"),
        Key(
            "train.kl_min_sigma",
            0.0,
            BELOW_ONE,
            "the KL divergence counts at noise levels of at least this, the early steps; 0: at all",
        ),
        Key(
            "train.forward_kl",
            0.0,
            NOT_NEGATIVE,
            "weight of the flow-matching loss on images of the base model, as many an update as its own",
        ),
        Key("forward_kl.images", 256, whole(1, 1_000_000), "train.forward_kl: base images, of the first train prompts"),
        Key("train.ema", True, YES_OR_NO, "keep an exponential moving average of the trained weights"),
        Key("train.ema_decay", 0.9, BELOW_ONE, "reached from below: update t decays by min((1 + t) / (10 + t), this)"),
        Key("train.max_nonfinite_updates", 5, whole(1), "so many skipped updates in a row stop the run"),
    ),
    "by rewards alone: GRPO and its kin; where none is named, all read it": (
        Key("train.num_inner_epochs", 1, whole(1, 1_000_000), "passes over an epoch's samples"),
        Key(
            "train.clip_range",
            1e-3,
            number("a number above 0 and below 1", lambda x: 0 < x < 1),
            "GRPO, AWM: the ratio is clipped to [1 - c, 1 + c]",
        ),
        Key("train.adv_clip_max", 5.0, POSITIVE, "all but FDFO: advantages are clamped to +-this"),
        Key(
            "train.advantage_mode",
            "all",
            choice("all", "positive", "negative", "weighted"),
            'all but FDFO: advantages that train, "all", "positive", "negative", or "weighted": the positive by 0.1',
        ),
        Key(
            "train.advantage_std",
            "group",
            choice("group", "batch", "none"),
            'all but FDFO: rewards are divided by the std of their "group", of the "batch" (the epoch), or by "none"',
        ),
        Key(
            "train.timestep_fraction",
            1.0,
            number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
            "GRPO: train on this fraction of the stochastic steps, drawn per update",
        ),
        Key(
            "train.kl_space",
            "gaussian",
            choice("gaussian", "velocity"),
            'GRPO: "gaussian", KL of the step\'s Gaussians, or "velocity", squared difference',
        ),
        Key("train.ratio_normalization", False, YES_OR_NO, "GRPO: GRPO-Guard's normalised ratio"),
        Key(
            "train.ratio",
            "sde",
            choice("sde", "ode_step", "ode_path", "cfm"),
            'GRPO: "sde", "ode_step", "ode_path" or "cfm", of flow_grpo/likelihood_ratio.py',
        ),
        Key(
            "train.ratio_probes",
            1,
            whole(0, 100_000),
            'GRPO: probes of a divergence of "ode_*", 0: the exact trace; draws of (noise, time) of "cfm"',
        ),
        Key(
            "train.max_ratio_error",
            1.0,
            POSITIVE,
            "GRPO, FDFO: |ratio - 1| allowed before an epoch's first update, in units of clip_range or fdfo.epsilon",
        ),
    ),
    "diversity in the objective: what an image's difference from its group adds": (
        Key(
            "shaping.kind",
            "",
            choice("", "distance", "cluster", "entropy", "vendi", "density", "log_vendi", "log_rke"),
            'black box: "distance", "cluster", "entropy", "vendi", "density"; by gradient: "log_vendi", "log_rke"',
        ),
        Key("shaping.weight", 0.0, NOT_NEGATIVE, "beta of a bonus, in units of the reward"),
        Key("shaping.bandwidth", 0.3, POSITIVE, '"entropy", "log_rke": of the kernel of unit features, 0 to 2 apart'),
        Key(
            "shaping.cluster_distance",
            0.1,
            number("a number above 0 and at most 2", lambda x: 0 < x <= 2),
            '"cluster": images are one cluster up to this average of 1 - cos',
        ),
        Key(
            "shaping.gate_share",
            0.0,
            number("a number from 0 to 1", lambda x: 0 <= x <= 1),
            "train.beta counts for this share of an epoch's images, which the training reward likes more than the "
            "gate's; 0: for all",
        ),
        Key(
            "shaping.gate_rewards",
            (),
            each(FILLED, "a tuple of names of rewards, or ()"),
            "the gate's: rewards that are not trained on",
        ),
        Key("shaping.probes", 1, whole(1, 100_000), '"density": probes of the divergence at each step'),
        Key(
            "shaping.extractor",
            "pixels",
            choice("pixels", "clip", "dinov2", "open_clip"),
            '"pixels": colours at 8 x 8 pixels, no network; or as diversity.extractor',
        ),
        Key("shaping.model", "", TEXT, "as diversity.model: neither a reward's, nor the judge's, nor diversity's"),
        Key("shaping.pretrained", "", TEXT, "as diversity.pretrained"),
    ),
    "reward gradients: DRTune and its kin": (
        Key("drtune.num_train_steps", 5, whole(1), "K: sampler steps that carry gradient; DRaFT-K: the last K"),
        Key(
            "drtune.early_stop",
            0,
            whole(0),
            "m: stop at a step drawn from the last m and decode x0_hat, as ReFL must; 0: run all steps",
        ),
        Key("drtune.two_pass", False, YES_OR_NO, "True: memory does not grow with K, for K more forwards"),
        Key(
            "drtune.detach_unconditional",
            False,
            YES_OR_NO,
            "True: no gradient through the unconditional half of guidance",
        ),
        Key("drtune.hinge", 0.0, NOT_NEGATIVE, "c of the loss relu(c - reward); 0: the plain loss, -reward"),
    ),
    **_of_methods(),
    "evaluation: ODE sampler, fixed prompts, fixed noise": (
        Key("eval.seed", 0, whole(0), "keys the noise: the same images are asked of every run, whatever its seed"),
        Key("eval.num_steps", 10, whole(1, 10_000), "steps of the ODE sampler"),
        Key("eval.guidance_scale", 1.0, NOT_NEGATIVE, "as sample.guidance_scale"),
        Key(
            "eval.tuned_share",
            (1.0, 1.0),
            each(number("a number from 0 to 1", lambda x: 0 <= x <= 1), "two numbers from 0 to 1", low=2, high=2),
            "g v_tuned + (1 - g) v_base: g at sigma = 1 and at sigma = 0, linear between",
        ),
        Key("eval.num_prompts", 0, whole(0), "the first so many test prompts; 0: all"),
        Key("eval.num_image_per_prompt", 16, whole(1, 1_000_000), "images of each test prompt"),
        Key("eval.batch_size", 80, whole(1), "images per forward, per process"),
        Key("eval.ema", True, YES_OR_NO, "evaluate the averaged weights as well as the current ones"),
        Key(
            "eval.rewards",
            (),
            each(FILLED, "a tuple of names of rewards, or ()"),
            "rewards measured besides those of reward_fn",
        ),
        Key(
            "eval.judge",
            "assets/tiny_features",
            TEXT,
            "for prompt accuracy: a CLIP not used as reward, or a detector of scenes; empty: none",
        ),
        Key(
            "eval.modes",
            "assets/prompts/tiny/modes.json",
            TEXT,
            "known modes of each prompt, counted by a judge that is a CLIP; empty: none",
        ),
        Key(
            "eval.curve",
            "",
            TEXT,
            "a curve.json of scripts/study/curve.py: diversity is told as a share of the exact law's, too; empty: none",
        ),
        Key("forward_kl.draws", 4, whole(1, 10_000), "eval_forward_kl, train.forward_kl: times and noises an image"),
        Key("eval.num_grid_prompts", 10, whole(1), "rows of the image grid"),
        Key("eval.num_grid_images", 8, whole(1), "columns of the image grid"),
    ),
    "entropy: along the evaluation's sampler and on its noise": (
        Key("entropy.num_prompts", 4, whole(1), "the first so many evaluated prompts"),
        Key(
            "entropy.num_image_per_prompt",
            16,
            whole(2, 1_000_000),
            "at least 2: the entropy's error comes from their spread",
        ),
        Key(
            "entropy.num_probes",
            4,
            whole(1, 100_000),
            "random probes of the divergence at each step; their error is reported from 2 on",
        ),
        Key(
            "entropy.distribution",
            "rademacher",
            choice("rademacher", "gaussian", "orthogonal"),
            '"rademacher", "gaussian" or "orthogonal"',
        ),
        Key(
            "entropy.solver",
            "euler",
            choice("euler", "heun", "rk4"),
            '"euler": the sampler\'s own steps; "heun"; "rk4"',
        ),
        Key("entropy.batch_size", 64, whole(1), "images per forward and backward, per process"),
        Key("entropy.num_strip_prompts", 4, whole(1), "rows of the film strip"),
    ),
    "diversity: flow_grpo/diversity, on the evaluation's sampler and noise": (
        Key(
            "diversity.extractor",
            "clip",
            choice("clip", "dinov2", "open_clip", "scenes"),
            '"clip" or "dinov2", of transformers; "open_clip"; "scenes": a detector of scenes',
        ),
        Key(
            "diversity.model", "assets/tiny_features", FILLED, "directory or hub id; open_clip: model name or its .json"
        ),
        Key("diversity.pretrained", "", TEXT, "open_clip only: pretrained tag or file of weights"),
        Key("diversity.num_prompts", 0, whole(0), "the first so many of prompts.eval_diversity; 0: all"),
        Key("diversity.order", 1.0, NOT_NEGATIVE, "q of the Vendi score"),
        Key(
            "diversity.bandwidth",
            0.0,
            NOT_NEGATIVE,
            "of the Gaussian kernel; 0: chosen once, on the base model, and kept",
        ),
        Key("diversity.num_draws", 200, whole(50, 1_000_000), "bootstrap draws of the 95 % intervals"),
        Key("diversity.batch_size", 64, whole(1), "images per forward of the extractor"),
    ),
}

# Keys that had another name: it, the present one, and what each former value is now. Runs of before are read by it.
RENAMED: Mapping[str, tuple[str, Mapping[Any, Any]]] = {
    "train.global_std": ("train.advantage_std", {False: "group", True: "batch"}),
    "train.use_8bit_adam": ("train.optimizer", {False: "adamw", True: "adamw_8bit"}),  # Flow-GRPO's
}

KEYS: dict[str, Key] = {key.name: key for keys in SECTIONS.values() for key in keys}


def get_config() -> ConfigDict:
    """Return the default configuration, locked: a key that is not declared here cannot be set."""
    config = ConfigDict()
    for key in KEYS.values():
        group = config
        *groups, name = key.name.split(".")
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        group[name] = ConfigDict() if isinstance(key.default, dict) else key.default
    return config.lock()


# Groups that have no members until one is named, and what a member is at first.
OPEN: Mapping[str, Any] = {"reward_files": "", "reward_constraint": 0.0, "reward_range": ()}


def declare(config: ConfigDict, keys: Iterable[str]) -> None:
    """Make the keys among these that belong to an open group; a reward of one's own also has a weight then, 1.

    So has one that an installed package announces, where its weight is named.
    """
    with config.unlocked():
        for key in keys:
            group, _, name = key.partition(".")
            if group == "reward_fn" and name and name not in config.reward_fn and name in announced():
                config.reward_files[name] = announced()[name]
            elif group in OPEN and name and "." not in name and name not in config[group]:
                config[group][name] = OPEN[group]
        for name in config.reward_files:
            if name not in config.reward_fn:
                config.reward_fn[name] = 1.0


def by_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their full names, those of a run of before under their present names and values."""
    found = {key: value for key, value in values.items() if key not in RENAMED}
    for former in values.keys() & RENAMED.keys():
        key, meanings = RENAMED[former]
        value = values[former]
        found[key] = next((now for then, now in meanings.items() if then == value), value)
    return found


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key by its full name, and its value: ("train.beta", 0.0), ..."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# On resuming a run, a change of these would change what is drawn or measured from there on.
SEEN = (
    "seed", "num_seeds", "pretrained.", "resolution", "height", "width", "max_sequence_length", "mixed_precision",
    "use_lora", "lora.", "prompts.", "negative_prompt", "reward_fn.", "reward_model.", "reward_dtype",
    "reward_ensemble", "reward_normalise", "reward_constraint.", "reward_augment", "shaping.",
    "use_reward_gradient", "sample.", "train.updates_per_epoch", "train.num_inner_epochs", "train.ratio",
    "train.timestep_fraction", "drtune.", "eval.", "entropy.", "diversity.", "eval_diversity", "eval_ode_log_prob",
    "eval_forward_kl", "forward_kl.", "targets.", "chat.",
)  # fmt: skip
OF_METHODS = tuple(key.name for method in METHODS.values() for key in method.keys)
NOT_SEEN = (  # last parts of names
    "batch_size", "num_grid_prompts", "num_grid_images", "num_strip_prompts", "eval_diversity_freq",
    "eval_ode_log_prob_freq",
)  # fmt: skip


def decides_what_is_seen(key: str) -> bool:
    """Whether a key decides which images are drawn, what they are rewarded for, or what is measured of them."""
    return key.startswith(SEEN + OF_METHODS) and key.split(".")[-1] not in NOT_SEEN
