"""GRPO, DRTune and the anchored gradient on other models than SD3.5, rewarded by PickScore.

What a model's own recipes share is in the file of its family. Prompts, reward, judge and evaluation are those of the
SD3.5 recipes; so are the epochs of the reward gradients. None of them has been run: their arithmetic is tested, and
their code on tiny models of the same classes. `train.method=NAME` makes another method of any of them.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.methods.base import Recipe
from flow_grpo.recipes import sd3
from flow_grpo.recipes.flux import flux
from flow_grpo.recipes.flux2_klein import flux2_klein
from flow_grpo.recipes.qwen_image import qwen_image
from flow_grpo.recipes.z_image import z_image


def _by_gradient(config: ConfigDict, family: Recipe) -> None:
    """SD3.5's DRTune, with the model, the guidance and the LoRA of the family."""
    sd3.pickscore_sd3_1batch_size_use_gradient(config)
    sample, train, resolution = config.sample.to_dict(), config.train.to_dict(), config.resolution
    family(config)
    config.sample.update(sample | {"guidance_scale": config.sample.guidance_scale})
    config.train.update(train)
    config.resolution, config.gradient_checkpointing = resolution, True


def _anchored(config: ConfigDict, family: Recipe) -> None:
    """What the anchored gradient changes in it: the strength that spends half a nat."""
    _by_gradient(config, family)
    config.train.method = "anchored"
    config.train.beta = 0.0
    config.anchored.target_kl = 0.5
    config.train.learning_rate = 3e-4


def pickscore_flux_grpo(config: ConfigDict) -> None:
    """GRPO on FLUX.1-dev, at the settings of flow_grpo/recipes/flux.py.

    Cost of an epoch, on 8 processes: 1,152 images; 6,912 sampling, 6,912 training, 0 reference.
    """
    sd3.pickscore_sd3(config)
    flux(config)


def pickscore_flux_drtune(config: ConfigDict) -> None:
    """DRTune on FLUX.1-dev at 256 pixels, on one GPU, one image at a time: 5 of 10 steps carry gradient.

    Cost of an epoch, on 1 process: 48 images; 480 sampling, 240 training, 240 reference.
    """
    _by_gradient(config, flux)


def pickscore_flux_anchored(config: ConfigDict) -> None:
    """The anchored gradient on FLUX.1-dev at 256 pixels, on one GPU, spending half a nat, w = kappa.

    Cost of an epoch, on 1 process: 48 images; 480 sampling, 240 training, 240 reference. Before the first one, 64
    base images of each of 16 prompts.
    """
    _anchored(config, flux)


def pickscore_flux2_klein_grpo(config: ConfigDict) -> None:
    """GRPO on FLUX.2-klein-base-4B, at the settings of flow_grpo/recipes/flux2_klein.py.

    Cost of an epoch, on 8 processes: 1,152 images; 23,040 sampling, 23,040 training, 0 reference.
    """
    sd3.pickscore_sd3(config)
    flux2_klein(config)


def pickscore_flux2_klein_drtune(config: ConfigDict) -> None:
    """DRTune on FLUX.2-klein-base-4B at 256 pixels, on one GPU, one image at a time: 5 of 10 steps carry gradient.

    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference.
    """
    _by_gradient(config, flux2_klein)


def pickscore_flux2_klein_anchored(config: ConfigDict) -> None:
    """The anchored gradient on FLUX.2-klein-base-4B at 256 pixels, on one GPU, spending half a nat, w = kappa.

    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference. Before the first one, 64
    base images of each of 16 prompts.
    """
    _anchored(config, flux2_klein)


def pickscore_qwen_image_grpo(config: ConfigDict) -> None:
    """GRPO on Qwen-Image, at the settings of flow_grpo/recipes/qwen_image.py.

    Cost of an epoch, on 8 processes: 512 images; 10,240 sampling, 2,048 training, 2,048 reference.
    """
    sd3.pickscore_sd3(config)
    qwen_image(config)


def pickscore_qwen_image_drtune(config: ConfigDict) -> None:
    """DRTune on Qwen-Image at 256 pixels, on one GPU, one image at a time: 5 of 10 steps carry gradient.

    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference.
    """
    _by_gradient(config, qwen_image)


def pickscore_qwen_image_anchored(config: ConfigDict) -> None:
    """The anchored gradient on Qwen-Image at 256 pixels, on one GPU, spending half a nat, w = kappa.

    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference. Before the first one, 64
    base images of each of 16 prompts.
    """
    _anchored(config, qwen_image)


def pickscore_z_image_grpo(config: ConfigDict) -> None:
    """GRPO on Z-Image, at the settings of flow_grpo/recipes/z_image.py.

    Cost of an epoch, on 8 processes: 1,152 images; 23,040 sampling, 23,040 training, 23,040 reference.
    """
    sd3.pickscore_sd3(config)
    z_image(config)


def pickscore_z_image_drtune(config: ConfigDict) -> None:
    """DRTune on Z-Image at 256 pixels, on one GPU, one image at a time: 5 of 10 steps carry gradient.

    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference.
    """
    _by_gradient(config, z_image)


def pickscore_z_image_anchored(config: ConfigDict) -> None:
    """The anchored gradient on Z-Image at 256 pixels, on one GPU, spending half a nat, w = kappa.

    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference. Before the first one, 64
    base images of each of 16 prompts.
    """
    _anchored(config, z_image)


RECIPES = (
    pickscore_flux_grpo,
    pickscore_flux_drtune,
    pickscore_flux_anchored,
    pickscore_flux2_klein_grpo,
    pickscore_flux2_klein_drtune,
    pickscore_flux2_klein_anchored,
    pickscore_qwen_image_grpo,
    pickscore_qwen_image_drtune,
    pickscore_qwen_image_anchored,
    pickscore_z_image_grpo,
    pickscore_z_image_drtune,
    pickscore_z_image_anchored,
)
