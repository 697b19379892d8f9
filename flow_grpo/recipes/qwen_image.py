"""Qwen-Image at its published settings."""

from ml_collections import ConfigDict


def qwen_image(config: ConfigDict) -> None:
    """Qwen-Image (20 B) at 512 pixels as Flow-GRPO trains it: 32 groups of 16 images, two stochastic steps of 10.

    Source: `pickscore_qwenimage` in config/grpo.py of Flow-GRPO (arXiv 2505.05470), whose epoch is the same on 8 and on
    32 GPUs; rank and alpha of the LoRA are those of its scripts/train_qwenimage_edit_plus.py. Prompts have at most 512
    tokens, and are evaluated in 50 steps: the defaults of QwenImagePipeline, as is the guidance scale of 4.
    """
    config.pretrained.model = "Qwen/Qwen-Image"
    config.resolution = 512
    config.max_sequence_length = 512
    config.mixed_precision = "bf16"
    config.gradient_checkpointing = True
    config.lora.rank = 64
    config.lora.alpha = 128.0

    config.sample.num_steps = 10
    config.sample.guidance_scale = 4.0
    config.sample.noise_level = 1.2
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    config.sample.groups_per_epoch = 32
    config.sample.num_image_per_prompt = 16
    config.sample.batch_size = 4
    config.train.batch_size = 4
    config.train.updates_per_epoch = 2
    config.train.advantage_std = "batch"
    config.train.ema = False

    config.eval.num_steps = 50
    config.eval.guidance_scale = 4.0
