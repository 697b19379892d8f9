"""Recipes: `--config config/grpo.py:NAME`. Each says only what differs from base.py.

The SD3.5 recipes use the published settings of Flow-GRPO (arXiv 2505.05470). Their prompts are not committed:
`fme prompts --dataset yuvalkirstain/pickapic_v1_no_images --column caption --out assets/prompts/pickscore`.

What to expect of each method on the tiny SD3, in reward and in diversity: docs/methods.md, "How they compare".

Costs are counted, not measured: images and evaluations of the transformer (one image through it once; guidance
doubles them) in one epoch over all processes, evaluation apart. `sampling` needs no gradient, `training` is a forward
and a backward pass, `reference` is the forward pass of the KL divergence. `old` are those of a ratio whose old side the
rollout does not give; where that ratio has a divergence, each probe adds a backward pass to an `old` evaluation, and to
a `training` one that pass and the derivative of it.
"""

from ml_collections import ConfigDict

PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP = "openai/clip-vit-large-patch14"
DINOV2 = "facebook/dinov2-large"


def tiny_sd3(config: ConfigDict) -> None:
    """GRPO on the embedded tiny SD3, rewarded by the tiny PickScore.

    Cost of an epoch, on 1 process: 80 images; 800 sampling, 800 training, 0 reference.
    """
    config.reward_fn.pickscore = 1.0
    config.num_epochs = 150


def tiny_sd3_use_gradient(config: ConfigDict) -> None:
    """DRTune on the embedded tiny SD3: the reward's gradient through 5 of 10 steps, one update of 40 images an epoch.

    Cost of an epoch, on 1 process: 40 images; 200 sampling, 200 training, 0 reference.
    """
    tiny_sd3(config)
    config.use_reward_gradient = True
    config.num_epochs = 40
    config.sample.sde_type = "ode"
    config.sample.num_image_per_prompt = 4
    config.train.updates_per_epoch = 1


def tiny_sd3_nsr(config: ConfigDict) -> None:
    """Negative-sample reinforcement on the embedded tiny SD3 (scripts/train/train_sd3_nsr.py), every evaluator on.

    Cost of an epoch, on 1 process: 80 images; 800 sampling, 800 training, 0 reference.
    """
    tiny_sd3(config)
    _negative_samples(config)


def tiny_sd3_ode_step(config: ConfigDict) -> None:
    """`tiny_grpo` with the ratio of the divergences at the sampled points, one probe each.

    Cost of an epoch, on 1 process: 80 images; 800 sampling, 800 training, 0 reference, 800 old.
    """
    tiny_sd3(config)
    config.train.ratio = "ode_step"


def tiny_sd3_ode_path(config: ConfigDict) -> None:
    """`tiny_grpo` with the ratio of the final images' densities under the ODE, one probe at each of its steps.

    Cost of an epoch, on 1 process: 80 images; 800 sampling, 800 training, 0 reference, 800 old.
    """
    tiny_sd3(config)
    config.train.ratio = "ode_path"


def tiny_sd3_cfm(config: ConfigDict) -> None:
    """`tiny_grpo` with the ratio of the final images' flow-matching losses, of as many draws as the sampler has steps.

    Cost of an epoch, on 1 process: 80 images; 800 sampling, 800 training, 0 reference, 800 old.
    """
    tiny_sd3(config)
    config.train.ratio = "cfm"
    config.train.ratio_probes = config.sample.num_steps


def pickscore_sd3(config: ConfigDict) -> None:
    """GRPO on SD3.5-medium, rewarded by PickScore: 48 groups of 24 images, a KL penalty, every step trained.

    Cost of an epoch, on 32 processes: 1,152 images; 23,040 sampling, 23,040 training, 23,040 reference.
    """
    _sd3_5_medium(config)
    config.reward_fn.pickscore = 1.0
    config.eval.judge = CLIP


def pickscore_sd3_4gpu(config: ConfigDict) -> None:
    """The same epochs as `sd35_grpo`, on four GPUs: each makes eight times as many of the images.

    Cost of an epoch, on 4 processes: 1,152 images; 23,040 sampling, 23,040 training, 23,040 reference.
    """
    pickscore_sd3(config)
    config.num_processes = 4


def pickscore_sd3_4gpu_nsr(config: ConfigDict) -> None:
    """`sd35_grpo_4gpu` by negative-sample reinforcement (scripts/train/train_sd3_nsr.py), every evaluator on.

    Cost of an epoch, on 4 processes: 1,152 images; 23,040 sampling, 23,040 training, 23,040 reference.
    """
    pickscore_sd3_4gpu(config)
    _negative_samples(config)


def pickscore_sd3_4gpu_ode_logprob(config: ConfigDict) -> None:
    """`sd35_grpo_4gpu` with the ratio of the divergences at the sampled points, one probe each; without the KL.

    One image per backward pass, which changes no update: second derivatives need plain attention, whose memory grows
    with the square of the number of tokens, and gradient checkpointing saves none of theirs.
    Cost of an epoch, on 4 processes: 1,152 images; 23,040 sampling, 23,040 training, 0 reference, 23,040 old.
    """
    pickscore_sd3_4gpu(config)
    config.train.ratio = "ode_step"
    config.train.beta = 0.0
    config.train.batch_size = 1


def pickscore_sd3_1batch_size(config: ConfigDict) -> None:
    """`sd35_grpo` in the least memory, on one GPU: one image at a time, and epochs of 8 groups instead of 48.

    Cost of an epoch, on 1 process: 192 images; 3,840 sampling, 3,840 training, 3,840 reference.
    """
    pickscore_sd3(config)
    config.gradient_checkpointing = True
    config.sample.groups_per_epoch = 8
    config.sample.batch_size = 1
    config.train.batch_size = 1
    config.eval.num_prompts = 32
    config.eval.batch_size = 4


def pickscore_sd3_1batch_size_use_gradient(config: ConfigDict) -> None:
    """DRTune on SD3.5-medium at 256 pixels, on one GPU, one image at a time: 5 of 10 steps carry gradient.

    Groups of one image (nothing is compared within a group), two updates of 24 images an epoch, and the two-pass
    gradient, whose memory does not grow with the number of steps.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference.
    """
    pickscore_sd3_1batch_size(config)
    config.use_reward_gradient = True
    config.resolution = 256
    config.sample.sde_type = "ode"
    config.sample.groups_per_epoch = 48
    config.sample.num_image_per_prompt = 1
    config.train.learning_rate = 1e-4
    config.drtune.two_pass = True


def pickscore_sd3_fast(config: ConfigDict) -> None:
    """Flow-GRPO-Fast: only the two steps of a window drawn from the first half are stochastic and trained.

    Cost of an epoch, on 32 processes: 1,152 images; 23,040 sampling, 4,608 training, 4,608 reference.
    """
    pickscore_sd3(config)
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)


def pickscore_sd3_fast_4gpu(config: ConfigDict) -> None:
    """The same epochs as `sd35_grpo_fast`, on four GPUs.

    Cost of an epoch, on 4 processes: 1,152 images; 23,040 sampling, 4,608 training, 4,608 reference.
    """
    pickscore_sd3_fast(config)
    config.num_processes = 4


def pickscore_sd3_fast_nocfg(config: ConfigDict) -> None:
    """Flow-GRPO-Fast without guidance, in training and in evaluation: cps steps, a tighter clip, no KL penalty.

    Cost of an epoch, on 32 processes: 1,152 images; 11,520 sampling, 2,304 training, 0 reference.
    """
    pickscore_sd3_fast(config)
    config.sample.guidance_scale = 1.0
    config.sample.sde_type = "cps"
    config.sample.noise_level = 0.8
    config.train.clip_range = 1e-5
    config.train.beta = 0.0
    config.eval.guidance_scale = 1.0


def clipscore_sd3(config: ConfigDict) -> None:
    """GRPO on SD3.5-medium, rewarded by CLIPScore and judged by PickScore.

    Cost of an epoch, on 32 processes: 1,152 images; 23,040 sampling, 23,040 training, 23,040 reference.
    """
    _sd3_5_medium(config)
    config.reward_fn.clipscore = 1.0
    config.eval.judge = PICKSCORE


def compressibility(config: ConfigDict) -> None:
    """GRPO on SD3.5-medium, rewarded by how small its JPEG is: a reward without a gradient, and no model to load.

    Cost of an epoch, on 8 processes: 1,152 images; 23,040 sampling, 23,040 training, 23,040 reference.
    """
    _sd3_5_medium(config)
    config.reward_fn.jpeg_compressibility = 1.0
    config.eval.judge = CLIP


def _negative_samples(config: ConfigDict) -> None:
    """Only images below their group's mean teach (arXiv 2506.01347), and all that is measured is."""
    config.train.advantage_mode = "negative"
    config.eval_ode_log_prob = config.visualize_steps = True


def _sd3_5_medium(config: ConfigDict) -> None:
    """What the SD3.5 recipes share: Flow-GRPO's settings, and 128 prompts x 4 images evaluated every 30 epochs.

    Besides, 12 more images of 16 of these prompts, for their diversity in DINOv2-large (a download of 1.2 GB, as much
    GPU memory, and a forward of 256 images an evaluation); eval_diversity=false does without.
    """
    config.num_epochs = 1000
    config.eval_freq = 30
    config.save_freq = 30

    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.resolution = 512
    config.max_sequence_length = 128
    config.mixed_precision = "bf16"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.prompts.train = "assets/prompts/pickscore/train.txt"
    config.prompts.test = "assets/prompts/pickscore/test.txt"
    config.prompts.eval_diversity = "assets/prompts/pickscore/test.txt"
    config.reward_model.pickscore = PICKSCORE
    config.reward_model.clipscore = CLIP

    config.sample.num_steps = 10
    config.sample.guidance_scale = 4.5
    config.sample.noise_level = 0.7
    config.sample.groups_per_epoch = 48
    config.sample.num_image_per_prompt = 24
    config.sample.batch_size = 9
    config.train.batch_size = 9
    config.train.updates_per_epoch = 2
    config.train.learning_rate = 3e-4
    config.train.beta = 0.01
    config.train.clip_range = 1e-4
    config.train.ema_decay = 0.9

    config.eval.num_steps = 40
    config.eval.guidance_scale = 4.5
    config.eval.num_prompts = 128
    config.eval.num_image_per_prompt = 4
    config.eval.num_grid_images = 4
    config.eval.batch_size = 16
    config.eval.modes = ""

    config.diversity.extractor = "dinov2"
    config.diversity.model = DINOV2
    config.diversity.num_prompts = 16
