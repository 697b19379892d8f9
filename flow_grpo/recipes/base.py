"""Every configuration key, once: default, meaning, unit. Recipes in sd3.py say only what differs.

The defaults are the embedded tiny SD3 on two CPU cores; `flow_grpo.settings.resolve` checks every value, and
`fme ls keys` prints this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str  # in full, as "train.beta"
    default: Any  # its type is that of every value
    meaning: str


SECTIONS: dict[str, tuple[Key, ...]] = {
    "the run": (
        Key("run_name", "", "folder under logdir; empty: recipe name and the time of day"),
        Key("recipe", "", "name of the recipe, set by itself"),
        Key("logdir", "logs", "where run folders are written"),
        Key("project", "flow-matching-entropy", "project name for wandb"),
        Key("trackers", ("tensorboard",), 'any of "wandb", "tensorboard"; metrics.jsonl is always written'),
        Key("seed", 42, "every random number is keyed by it"),
        Key("num_epochs", 100, "stop after so many epochs"),
        Key("max_seconds", 0.0, "stop after so many seconds of training, evaluation not counted; 0: no limit"),
        Key("num_processes", 0, "refuse to start on another number of processes; 0: take what is launched"),
        Key("num_threads", 0, "CPU threads per process; 0: leave torch's choice"),
        Key("resume_from", "", "a run folder, its checkpoints folder, or one checkpoint"),
    ),
    "how often, in epochs; 0: never": (
        Key("eval_freq", 10, "evaluate before the first epoch, every so many, and after the last"),
        Key("eval_ode_log_prob", False, "measure log-densities and the differential entropy of the samples"),
        Key("eval_ode_log_prob_freq", 0, "measure them every so many epochs; 0: as eval_freq"),
        Key("eval_diversity", True, "measure Vendi, RKE and their company on the samples"),
        Key("eval_diversity_freq", 0, "measure them every so many epochs; 0: as eval_freq"),
        Key("num_seeds", 16, "images of each diversity prompt; its first ones are those of the other evaluators"),
        Key("visualize_steps", False, "draw film strips with log-density and divergence of every sampler step"),
        Key("visualize_steps_freq", 0, "draw them every so many epochs; 0: as eval_freq"),
        Key("save_freq", 10, "write a checkpoint every so many epochs, and after the last"),
        Key("num_checkpoint_limit", 5, "keep so many latest checkpoints, plus the best; 0: keep all"),
    ),
    "the model": (
        Key("pretrained.model", "assets/tiny_sd3", "a StableDiffusion3Pipeline: directory or hub id"),
        Key("pretrained.revision", "", "hub revision; empty: the default branch"),
        Key("resolution", 32, "height and width of the images, in pixels"),
        Key("max_sequence_length", 8, "tokens given to the T5 encoder"),
        Key("mixed_precision", "no", '"no", "bf16" or "fp16": dtype of the frozen weights and of autocast'),
        Key("allow_tf32", True, "TF32 matrix products on GPUs"),
        Key("gradient_checkpointing", False, "recompute the transformer's activations in the backward pass"),
        Key("prompt_cache_size", 1024, "prompts whose embeddings are kept in memory"),
        Key("use_lora", True, "False: fine-tune every weight of the transformer"),
        Key("lora.rank", 16, "rank of the update of each module"),
        Key("lora.alpha", 32.0, "the update is scaled by alpha / rank"),
        Key(
            "lora.target_modules",
            (
                "attn.add_k_proj",
                "attn.add_q_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "attn.to_k",
                "attn.to_out.0",
                "attn.to_q",
                "attn.to_v",
            ),
            "ends of module names; modules without effect on the output are left out",
        ),
    ),
    "prompts": (
        Key(
            "prompts.train",
            "assets/prompts/tiny/train.txt",
            'a .txt, one prompt a line, or a .jsonl: {"prompt": ..., ...}',
        ),
        Key("prompts.test", "assets/prompts/tiny/test.txt", "prompts that are evaluated"),
        Key(
            "prompts.eval_diversity",
            "assets/prompts/tiny/eval_diversity.txt",
            "prompts whose images' diversity is measured",
        ),
    ),
    "rewards: the training reward is the sum of weight * reward over the non-zero weights": (
        Key("reward_fn.pickscore", 0.0, "exp(logit_scale) cos(image, prompt) / 26"),
        Key("reward_fn.clipscore", 0.0, "exp(logit_scale) cos(image, prompt) / 30"),
        Key("reward_fn.jpeg_compressibility", 0.0, "-kilobytes of the JPEG; no gradient"),
        Key("reward_fn.jpeg_incompressibility", 0.0, "kilobytes of the JPEG; no gradient"),
        Key("reward_model.pickscore", "assets/tiny_pickscore", "the PickScore: directory or hub id"),
        Key("reward_model.clipscore", "assets/tiny_pickscore", "the CLIP of the CLIPScore: directory or hub id"),
    ),
    "which loop": (
        Key(
            "use_reward_gradient",
            False,
            "False: GRPO (flow_grpo/methods/grpo.py); True: DRTune (flow_grpo/methods/reward_gradient.py)",
        ),
    ),
    "sampling, during training": (
        Key("sample.num_steps", 10, "sampler steps"),
        Key("sample.guidance_scale", 1.0, "classifier-free guidance; 1: one forward, no guidance"),
        Key("sample.sde_type", "sde", '"ode", "sde", "dance" or "cps": flow_grpo/diffusers_patch/step.py'),
        Key("sample.noise_level", 0.7, "eta of the stochastic samplers"),
        Key("sample.sde_window_size", 0, "GRPO: so many consecutive stochastic (trained) steps, the rest ODE; 0: all"),
        Key("sample.sde_window_range", (0, 0), "GRPO: first and one-past-last step the window may cover; (0, 0): all"),
        Key("sample.groups_per_epoch", 10, "prompts drawn per epoch, over all processes"),
        Key("sample.num_image_per_prompt", 8, "group size: images per drawn prompt"),
        Key(
            "sample.batch_size",
            80,
            "GRPO: images per forward, per process; in bf16 and fp16, train.batch_size is taken",
        ),
    ),
    "training, both loops": (
        Key("train.batch_size", 40, "images per forward and backward, per process"),
        Key("train.updates_per_epoch", 2, "optimizer steps into which an epoch's images are divided"),
        Key("train.learning_rate", 1e-3, "AdamW's"),
        Key("train.adam_beta1", 0.9, "AdamW: decay of the gradient's average"),
        Key("train.adam_beta2", 0.999, "AdamW: decay of the average of its square"),
        Key("train.adam_weight_decay", 1e-4, "AdamW: decoupled"),
        Key("train.adam_epsilon", 1e-8, "AdamW: added to the root of the average square"),
        Key("train.max_grad_norm", 1.0, "gradients are clipped to this norm"),
        Key("train.beta", 0.0, "weight of the KL divergence to the reference model"),
        Key("train.ema", True, "keep an exponential moving average of the trained weights"),
        Key("train.ema_decay", 0.9, "reached from below: update t decays by min((1 + t) / (10 + t), this)"),
        Key("train.max_nonfinite_updates", 5, "so many skipped updates in a row stop the run"),
    ),
    "GRPO only": (
        Key("train.num_inner_epochs", 1, "passes over an epoch's samples"),
        Key("train.clip_range", 1e-3, "the ratio is clipped to [1 - c, 1 + c]"),
        Key("train.adv_clip_max", 5.0, "advantages are clamped to +-this"),
        Key("train.advantage_mode", "all", '"all", "positive", "negative" or "weighted"'),
        Key("train.global_std", False, "normalise by the std of the whole epoch instead of the group's"),
        Key("train.timestep_fraction", 1.0, "train on this fraction of the stochastic steps, drawn per update"),
        Key("train.kl_space", "gaussian", '"gaussian": KL of the step\'s Gaussians; "velocity": squared difference'),
        Key("train.ratio_normalization", False, "GRPO-Guard's normalised ratio"),
        Key("train.ratio", "sde", '"sde", "ode_step", "ode_path" or "cfm": flow_grpo/likelihood_ratio.py'),
        Key(
            "train.ratio_probes",
            1,
            '"ode_*": probes of a divergence, 0: the exact trace; "cfm": draws of (noise, time)',
        ),
        Key("train.max_ratio_error", 1.0, "|ratio - 1| allowed before an epoch's first update, in units of clip_range"),
    ),
    "DRTune only": (
        Key("drtune.num_train_steps", 5, "K: sampler steps that carry gradient"),
        Key("drtune.early_stop", 0, "m: stop at a step drawn from the last m and decode x0_hat; 0: run all steps"),
        Key("drtune.two_pass", False, "True: memory does not grow with K, for K more forwards"),
        Key("drtune.hinge", 0.0, "c of the loss relu(c - reward); 0: the plain loss, -reward"),
    ),
    "evaluation: ODE sampler, fixed prompts, fixed noise": (
        Key("eval.seed", 0, "keys the noise: the same images are asked of every run, whatever its seed"),
        Key("eval.num_steps", 10, "steps of the ODE sampler"),
        Key("eval.guidance_scale", 1.0, "as sample.guidance_scale"),
        Key("eval.num_prompts", 0, "the first so many test prompts; 0: all"),
        Key("eval.num_image_per_prompt", 16, "images of each test prompt"),
        Key("eval.batch_size", 80, "images per forward, per process"),
        Key("eval.ema", True, "evaluate the averaged weights as well as the current ones"),
        Key("eval.rewards", (), "rewards measured besides those of reward_fn"),
        Key("eval.judge", "assets/tiny_features", "a CLIP not used as reward, for prompt accuracy; empty: none"),
        Key("eval.modes", "assets/prompts/tiny/modes.json", "known modes of each prompt, counted; empty: none"),
        Key("eval.num_grid_prompts", 10, "rows of the image grid"),
        Key("eval.num_grid_images", 8, "columns of the image grid"),
    ),
    "entropy: along the evaluation's sampler and on its noise": (
        Key("entropy.num_prompts", 4, "the first so many evaluated prompts"),
        Key("entropy.num_image_per_prompt", 16, "at least 2: the entropy's error comes from their spread"),
        Key("entropy.num_probes", 4, "random probes of the divergence at each step; their error is reported from 2 on"),
        Key("entropy.distribution", "rademacher", '"rademacher", "gaussian" or "orthogonal"'),
        Key("entropy.solver", "euler", '"euler": the sampler\'s own steps; "heun"; "rk4"'),
        Key("entropy.batch_size", 64, "images per forward and backward, per process"),
        Key("entropy.num_strip_prompts", 4, "rows of the film strip"),
    ),
    "diversity: flow_grpo/diversity, on the evaluation's sampler and noise": (
        Key("diversity.extractor", "clip", '"clip" or "dinov2", of transformers, or "open_clip"'),
        Key("diversity.model", "assets/tiny_features", "directory or hub id; open_clip: model name or its .json"),
        Key("diversity.pretrained", "", "open_clip only: pretrained tag or file of weights"),
        Key("diversity.num_prompts", 0, "the first so many of prompts.eval_diversity; 0: all"),
        Key("diversity.order", 1.0, "q of the Vendi score"),
        Key("diversity.bandwidth", 0.0, "of the Gaussian kernel; 0: chosen once, on the base model, and kept"),
        Key("diversity.num_draws", 200, "bootstrap draws of the 95 % intervals"),
        Key("diversity.batch_size", 64, "images per forward of the extractor"),
    ),
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
        group[name] = key.default
    return config.lock()
