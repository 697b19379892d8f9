"""Flow-GRPO's reward for written words: how much of what the prompt quotes can be read in the image.

RapidOCR reads, by the weights in its own package and onnxruntime, on the CPU and offline. There is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from rapidocr import RapidOCR
from torch import Tensor

from flow_grpo.rewards.image_path import check_images, pictures
from flow_grpo.rewards.prompt_words import asked_for, letters
from flow_grpo.rewards.registry import Metadata


class Ocr:
    """1 - edit distance / letters asked for, between 0 and 1; 1 too if more is written besides.

    Case and spaces do not count. The words asked for are the first that stand in double quotes.
    """

    name = "ocr"
    differentiable = False

    def __init__(self) -> None:
        self.reader: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,  # no search for words that stand on their heads, as in Flow-GRPO
                "Det.limit_type": "max",  # words are looked for at the image's own size, up to so many pixels
                "Det.limit_side_len": 960,
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32; NaN for an image with NaN.

        Raises ValueError for a prompt that quotes nothing.
        """
        check_images(images)
        asked = [asked_for(prompt) for prompt in prompts]
        found = [
            math.nan if picture is None else share(self.read(picture), words)
            for picture, words in zip(pictures(images), asked, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32, device=images.device)

    def read(self, picture: Image.Image) -> str:
        """All that is written in a picture, from top to bottom."""
        return " ".join(self.reader(picture).txts or ())


def share(read: str, asked: str) -> float:
    """1 - edit distance / length of what was asked for, not below 0; 1 if it is a part of what was read."""
    read, asked = letters(read), letters(asked)
    return 1.0 if asked in read else 1 - min(Levenshtein.distance(read, asked), len(asked)) / len(asked)
