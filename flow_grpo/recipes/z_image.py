"""Z-Image at its published settings."""

from ml_collections import ConfigDict


def z_image(config: ConfigDict) -> None:
    """Z-Image (6 B) at 1024 pixels, drawn as published; its images are trained in 10 steps, as other models' are.

    Source: examples/dreambooth/README_z_image.md of diffusers, which draws and trains at 1024 pixels, 50 steps, prompts
    of at most 512 tokens and guidance 5: the pipeline adds 5 times the difference to the conditional velocity, which is
    a scale of 6 here. It says no more of LoRAs than that alpha is mostly once or twice the rank; 32 and 64 are
    Flow-GRPO's for SD3.5 (arXiv 2505.05470), as are the 10 steps. For Z-Image-Turbo, which is drawn in 8 steps without
    guidance: pretrained.model=Tongyi-MAI/Z-Image-Turbo, steps 8 and scales 1.
    """
    config.pretrained.model = "Tongyi-MAI/Z-Image"
    config.resolution = 1024
    config.max_sequence_length = 512
    config.mixed_precision = "bf16"
    config.gradient_checkpointing = True
    config.lora.rank = 32
    config.lora.alpha = 64.0

    config.sample.num_steps = 10
    config.sample.guidance_scale = 6.0
    config.eval.num_steps = 50
    config.eval.guidance_scale = 6.0
