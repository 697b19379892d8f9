"""Every configuration key, once: default, unit, meaning. Recipes in sd3.py say only what differs.

The defaults are the embedded tiny SD3 on two CPU cores; `flow_grpo.settings.resolve` checks every value.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the default configuration, locked: a key that is not declared here cannot be set."""
    config = ConfigDict()

    # --- the run -----------------------------------------------------------------------------------
    config.run_name = ""  # folder under logdir; empty: recipe name and the time of day
    config.recipe = ""  # name of the recipe, set by config/grpo.py
    config.logdir = "logs"  # where run folders are written
    config.project = "flow-matching-entropy"  # project name for wandb
    config.trackers = ("tensorboard",)  # any of "wandb", "tensorboard"; metrics.jsonl is always written
    config.seed = 42  # every random number is keyed by it
    config.num_epochs = 100  # stop after so many epochs ...
    config.max_seconds = 0.0  # ... or after so many seconds of training, evaluation not counted; 0: no limit
    config.num_processes = 0  # refuse to start on another number of processes; 0: take what is launched
    config.num_threads = 0  # CPU threads per process; 0: leave torch's choice
    config.resume_from = ""  # a run folder, its checkpoints folder, or one checkpoint

    # --- how often, in epochs; 0: never --------------------------------------------------------------
    config.eval_freq = 10  # evaluate before the first epoch, every so many, and after the last
    config.eval_ode_log_prob = False  # measure log-densities and the differential entropy of the samples ...
    config.eval_ode_log_prob_freq = 10  # ... every so many epochs
    config.eval_diversity = False  # measure Vendi, RKE and their company on the samples ...
    config.eval_diversity_freq = 10  # ... every so many epochs
    config.num_seeds = 32  # images of each diversity prompt; its first ones are those of the other evaluators
    config.visualize_steps = False  # draw film strips with log-density and divergence of every sampler step ...
    config.visualize_steps_freq = 10  # ... every so many epochs
    config.save_freq = 10  # write a checkpoint every so many epochs, and after the last
    config.num_checkpoint_limit = 5  # keep so many latest checkpoints, plus the best; 0: keep all

    # --- the model -----------------------------------------------------------------------------------
    config.pretrained = ConfigDict()
    config.pretrained.model = "assets/tiny_sd3"  # a StableDiffusion3Pipeline: directory or hub id
    config.pretrained.revision = ""  # hub revision; empty: the default branch
    config.resolution = 32  # height and width of the images, in pixels
    config.max_sequence_length = 8  # tokens given to the T5 encoder
    config.mixed_precision = "no"  # "no", "bf16" or "fp16": dtype of the frozen weights and of autocast
    config.allow_tf32 = True  # TF32 matrix products on GPUs
    config.gradient_checkpointing = False  # recompute the transformer's activations in the backward pass
    config.prompt_cache_size = 1024  # prompts whose embeddings are kept in memory

    config.use_lora = True  # False: fine-tune every weight of the transformer
    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0  # the update is scaled by alpha / rank
    config.lora.target_modules = (  # ends of module names; modules without effect on the output are left out
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    # --- prompts -------------------------------------------------------------------------------------
    config.prompts = ConfigDict()
    config.prompts.train = "assets/prompts/tiny/train.txt"  # .txt: one prompt a line; .jsonl: {"prompt": ..., ...}
    config.prompts.test = "assets/prompts/tiny/test.txt"  # evaluated
    config.prompts.eval_diversity = "assets/prompts/tiny/eval_diversity.txt"  # whose images' diversity is measured

    # --- rewards: the training reward is the sum of weight * reward over the non-zero weights -----------
    config.reward_fn = ConfigDict()
    config.reward_fn.pickscore = 0.0  # exp(logit_scale) cos(image, prompt) / 26
    config.reward_fn.clipscore = 0.0  # exp(logit_scale) cos(image, prompt) / 30
    config.reward_fn.jpeg_compressibility = 0.0  # -kilobytes of the JPEG; no gradient
    config.reward_fn.jpeg_incompressibility = 0.0  # kilobytes of the JPEG; no gradient
    config.reward_model = ConfigDict()  # checkpoints of the rewards that have one: directory or hub id
    config.reward_model.pickscore = "assets/tiny_pickscore"
    config.reward_model.clipscore = "assets/tiny_pickscore"

    # --- which loop ----------------------------------------------------------------------------------
    config.use_reward_gradient = False  # False: GRPO (flow_grpo/grpo.py); True: DRTune (flow_grpo/drtune.py)

    # --- sampling, during training ---------------------------------------------------------------------
    config.sample = ConfigDict()
    config.sample.num_steps = 10  # sampler steps
    config.sample.guidance_scale = 1.0  # classifier-free guidance; 1: one forward, no guidance
    config.sample.sde_type = "sde"  # "ode", "sde", "dance" or "cps": flow_grpo/diffusers_patch/step.py
    config.sample.noise_level = 0.7  # eta of the stochastic samplers
    config.sample.sde_window_size = 0  # GRPO: so many consecutive stochastic (trained) steps, the rest ODE; 0: all
    config.sample.sde_window_range = (0, 0)  # GRPO: first and one-past-last step the window may cover; (0, 0): all
    config.sample.groups_per_epoch = 10  # prompts drawn per epoch, over all processes
    config.sample.num_image_per_prompt = 8  # group size: images per drawn prompt
    config.sample.batch_size = 80  # GRPO: images per forward, per process; in bf16 and fp16, train.batch_size is taken

    # --- training, both loops -----------------------------------------------------------------------
    config.train = ConfigDict()
    config.train.batch_size = 40  # images per forward and backward, per process
    config.train.updates_per_epoch = 2  # optimizer steps into which an epoch's images are divided
    config.train.learning_rate = 1e-3  # AdamW
    config.train.adam_beta1 = 0.9  # decay of the gradient's average ...
    config.train.adam_beta2 = 0.999  # ... and of its square's
    config.train.adam_weight_decay = 1e-4  # decoupled
    config.train.adam_epsilon = 1e-8  # added to the root of the average square
    config.train.max_grad_norm = 1.0  # gradients are clipped to this norm
    config.train.beta = 0.0  # weight of the KL divergence to the reference model
    config.train.ema = True  # keep an exponential moving average of the trained weights
    config.train.ema_decay = 0.9  # reached from below: update t decays by min((1 + t) / (10 + t), this)
    config.train.max_nonfinite_updates = 5  # so many skipped updates in a row stop the run

    # --- GRPO only -------------------------------------------------------------------------------------
    config.train.num_inner_epochs = 1  # passes over an epoch's samples
    config.train.clip_range = 1e-3  # the ratio is clipped to [1 - c, 1 + c]
    config.train.adv_clip_max = 5.0  # advantages are clamped to +-this
    config.train.advantage_mode = "all"  # "all", "positive", "negative" or "weighted"
    config.train.global_std = False  # normalise by the std of the whole epoch instead of the group's
    config.train.timestep_fraction = 1.0  # train on this fraction of the stochastic steps, drawn per update
    config.train.kl_space = "gaussian"  # "gaussian": KL of the step's Gaussians; "velocity": squared difference
    config.train.ratio_normalization = False  # GRPO-Guard's normalised ratio
    config.train.ratio = "sde"  # "sde", "ode_step", "ode_path" or "cfm": flow_grpo/likelihood_ratio.py
    config.train.ratio_probes = 1  # "ode_*": probes of a divergence, 0: the exact trace; "cfm": draws of (noise, time)
    config.train.max_ratio_error = 1.0  # |ratio - 1| allowed before an epoch's first update, in units of clip_range

    # --- DRTune only -----------------------------------------------------------------------------------
    config.drtune = ConfigDict()
    config.drtune.num_train_steps = 5  # K: sampler steps that carry gradient
    config.drtune.early_stop = 0  # m: stop at a step drawn from the last m and decode x0_hat; 0: run all steps
    config.drtune.two_pass = False  # True: memory does not grow with K, for K more forwards
    config.drtune.hinge = 0.0  # c of the loss relu(c - reward); 0: the plain loss, -reward

    # --- evaluation: ODE sampler, fixed prompts, fixed noise ----------------------------------------------
    config.eval = ConfigDict()
    config.eval.seed = 0  # keys the noise: the same images are asked of every run, whatever its seed
    config.eval.num_steps = 10  # ODE steps
    config.eval.guidance_scale = 1.0  # as sample.guidance_scale
    config.eval.num_prompts = 0  # the first so many test prompts; 0: all
    config.eval.num_image_per_prompt = 16  # images of each
    config.eval.batch_size = 80  # images per forward, per process
    config.eval.ema = True  # evaluate the averaged weights as well as the current ones
    config.eval.rewards = ()  # rewards measured besides those of reward_fn
    config.eval.judge = "assets/tiny_features"  # a CLIP not used as reward, for prompt accuracy; empty: none
    config.eval.modes = "assets/prompts/tiny/modes.json"  # known modes of each prompt, counted; empty: none
    config.eval.num_grid_prompts = 10  # rows of the image grid
    config.eval.num_grid_images = 8  # columns of the image grid

    # --- entropy: along the evaluation's sampler and on its noise ------------------------------------------
    config.entropy = ConfigDict()
    config.entropy.num_prompts = 4  # the first so many evaluated prompts
    config.entropy.num_image_per_prompt = 16  # at least 2: the entropy's error comes from their spread
    config.entropy.num_probes = 4  # random probes of the divergence at each step; their error is reported from 2 on
    config.entropy.distribution = "rademacher"  # "rademacher", "gaussian" or "orthogonal"
    config.entropy.solver = "euler"  # "euler": the sampler's own steps; "heun"; "rk4"
    config.entropy.batch_size = 64  # images per forward and backward, per process
    config.entropy.num_strip_prompts = 4  # rows of the film strip

    # --- diversity: flow_grpo/diversity, on the evaluation's sampler and noise ------------------------
    config.diversity = ConfigDict()
    config.diversity.extractor = "clip"  # "clip" or "dinov2", of transformers, or "open_clip"
    config.diversity.model = "assets/tiny_features"  # directory or hub id; open_clip: model name or its .json
    config.diversity.pretrained = ""  # open_clip only: pretrained tag or file of weights
    config.diversity.num_prompts = 0  # the first so many of prompts.eval_diversity; 0: all
    config.diversity.order = 1.0  # q of the Vendi score
    config.diversity.bandwidth = 0.0  # of the Gaussian kernel; 0: chosen once, on the base model, and kept
    config.diversity.num_draws = 200  # bootstrap draws of the 95 % intervals
    config.diversity.batch_size = 64  # images per forward of the extractor

    return config.lock()
