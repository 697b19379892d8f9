"""What recipes for FLUX.1 share."""

from ml_collections import ConfigDict

from flow_grpo.models.registry import FLUX


def flux(config: ConfigDict) -> None:
    """FLUX.1-dev at the settings of Flow-GRPO (arXiv 2505.05470): 512 pixels, 6 steps, groups of 24, no KL penalty.

    Its guidance of 3.5 is the distilled one; there is no classifier-free guidance, so no negative prompt. From its
    `pickscore_flux` (config/grpo.py), `config/base.py` and `scripts/train_flux.py`, where the LoRA (rank 64, alpha 128,
    of attention and feed-forward layers) and the 128 tokens of a prompt are. DanceGRPO (arXiv 2505.07818) has other
    ones: 720 pixels, 16 steps, groups of 12, every weight trained at 1e-5.
    """
    config.pretrained.model = "black-forest-labs/FLUX.1-dev"
    config.pretrained.distilled_guidance = 3.5
    config.resolution = 512
    config.max_sequence_length = 128
    config.mixed_precision = "bf16"
    config.lora.rank = 64
    config.lora.alpha = 128.0
    config.lora.target_modules = (
        *FLUX.lora_targets,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    config.sample.num_steps = 6
    config.sample.guidance_scale = 1.0
    config.sample.noise_level = 0.9
    config.sample.groups_per_epoch = 48
    config.sample.num_image_per_prompt = 24
    config.sample.batch_size = config.train.batch_size = 3
    config.train.updates_per_epoch = 2
    config.train.learning_rate = 3e-4
    config.train.beta = 0.0
    config.train.clip_range = 1e-4
    config.train.ema_decay = 0.9

    config.eval.num_steps = 28
    config.eval.guidance_scale = 1.0
