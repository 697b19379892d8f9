"""What recipes for FLUX.2-klein share."""

from ml_collections import ConfigDict


def flux2_klein(config: ConfigDict) -> None:
    """FLUX.2-klein-base-4B, the one that is not distilled: 512 pixels, 10 steps, guidance 4, groups of 24.

    We know of no published training of it by a reward. Guidance 4 and the 50 steps of an evaluation are diffusers'
    (`Flux2KleinPipeline.__call__`), as are the 512 tokens of a prompt, a dozen of which are the chat template's. The 10
    steps of training, groups, noise and clip are Flow-GRPO's of SD3.5, where guidance is classifier-free too. Rank 32
    is that of DiffSynth-Studio's LoRA of this model, with Flow-GRPO's alpha of twice the rank.
    """
    config.pretrained.model = "black-forest-labs/FLUX.2-klein-base-4B"
    config.resolution = 512
    config.max_sequence_length = 512
    config.mixed_precision = "bf16"
    config.lora.rank = 32
    config.lora.alpha = 64.0

    config.sample.num_steps = 10
    config.sample.guidance_scale = 4.0
    config.sample.noise_level = 0.7
    config.sample.groups_per_epoch = 48
    config.sample.num_image_per_prompt = 24
    config.sample.batch_size = config.train.batch_size = 3
    config.train.updates_per_epoch = 2
    config.train.learning_rate = 3e-4
    config.train.beta = 0.0
    config.train.clip_range = 1e-4
    config.train.ema_decay = 0.9

    config.eval.num_steps = 50
    config.eval.guidance_scale = 4.0
