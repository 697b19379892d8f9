"""Scores of rewards with a network beside those of the library's own path: its processor, 8 bits, and its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms
from transformers import CLIPModel, CLIPProcessor, SiglipImageProcessor, SiglipModel

from flow_grpo.rewards.frozen import fill
from flow_grpo.rewards.imagereward import MEAN, STD, ImageRewardScorer, renamed, sized
from tests.pictures import make_images, to_pil
from tests.rewards.networks import CASES, OPEN_CLIP, SIDE, blip_tensors
from tests.rewards.scoring import NO_METADATA

PROMPTS = ["a red sneaker", "a bag", "A very blue coat", "a dress"]
# Smooth and noisy pictures, larger, smaller, wide and high: the most by which a score differs, as a share of the spread
# of the scores over the images. What is left is the rounding to 8 bits, and the overshoot that it cuts.
PARITY = {"hpsv2": 0.05, "siglip": 0.05, "aesthetic": 0.1, "imagereward": 0.1}
SIZES = [(64, 64), (32, 48), (40, 72)]


def hpsv2(folder: Path, pictures: list[Image.Image]) -> Tensor:
    network = open_clip.CLIP(**OPEN_CLIP).eval()
    network.load_state_dict(torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"])
    preprocess = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest")
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    image, text, _ = network(pixels, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    return (image * text).sum(-1)


def siglip(folder: Path, pictures: list[Image.Image]) -> Tensor:
    from transformers import AutoTokenizer

    model, processor = SiglipModel.from_pretrained(folder), SiglipImageProcessor.from_pretrained(folder)
    pixels = processor(pictures, return_tensors="pt").pixel_values
    texts = AutoTokenizer.from_pretrained(folder)(
        [prompt.lower() for prompt in PROMPTS], padding="max_length", max_length=16, return_tensors="pt"
    )
    return model(input_ids=texts.input_ids, pixel_values=pixels).logits_per_image.diagonal()


def aesthetic(folder: Path, pictures: list[Image.Image]) -> Tensor:
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
    features = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
    weights = torch.load(folder / "aesthetic-model.pth")
    for place in (0, 2, 4, 6, 7):
        features = F.linear(features, weights[f"layers.{place}.weight"], weights[f"layers.{place}.bias"])
    return features[:, 0]


def imagereward(folder: Path, pictures: list[Image.Image]) -> Tensor:
    preprocess = transforms.Compose(
        [
            transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    tokens = ImageRewardScorer(str(folder)).tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    weights = {name: tensor.float() for name, tensor in torch.load(folder / "ImageReward.pt").items()}
    return (blip(weights, pixels, tokens.input_ids, tokens.attention_mask) - MEAN) / STD


LIBRARIES: dict[str, Callable[[Path, list[Image.Image]], Tensor]] = {
    "hpsv2": hpsv2, "siglip": siglip, "aesthetic": aesthetic, "imagereward": imagereward,
}  # fmt: skip


@pytest.mark.parametrize("name", LIBRARIES)
def test_scores_are_those_of_the_librarys_own_path(name: str, tmp_path: Path) -> None:
    CASES[name].save(tmp_path)
    reward = CASES[name].reward(CASES[name].scorer(str(tmp_path)))
    for size in SIZES:
        images = make_images(*size)
        with torch.no_grad():
            expected = LIBRARIES[name](tmp_path, to_pil(images))
            scores = reward(images, PROMPTS, NO_METADATA * 4)
            others = reward(images.flip(0), PROMPTS, NO_METADATA * 4)
        assert (scores - expected).abs().max() < PARITY[name] * expected.std()
        assert (others - expected).abs().max() > 5 * PARITY[name] * expected.std()


def test_imagereward_equals_its_definition_in_float64() -> None:
    weights = blip_tensors()
    network = sized(renamed(weights))
    fill(network, renamed(weights), "x")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    ids, mask = torch.randint(5, 13, (3, 35), generator=generator), torch.ones(3, 35, dtype=torch.long)
    mask[1, 10:] = 0
    expected = blip({name: tensor.double() for name, tensor in weights.items()}, pixels, ids, mask)
    with torch.no_grad():
        torch.testing.assert_close(network.double().eval()(pixels, ids, mask), expected, rtol=0, atol=1e-12)
        unmasked = network(pixels, ids, torch.ones_like(mask))
    assert (unmasked - expected).abs().argmax() == 1  # only the padded one changes
    assert torch.equal((unmasked - expected).abs() > 1e-6, torch.tensor([False, True, False]))


# --- BLIP with a head, written down from the papers, on the tensors as they are published -------------------


def blip(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The head's answers, from published tensors."""
    x = text_tower(w, ids, mask, image_tower(w, pixels))[:, 0]
    for place in (0, 2, 4, 6, 7):
        x = linear(w, f"mlp.layers.{place}", x)
    return x[:, 0]


def image_tower(w: dict[str, Tensor], pixels: Tensor, root: str = "blip.visual_encoder.") -> Tensor:
    """Layer norms before each part, of eps 1e-6."""
    patches = F.conv2d(pixels, w[f"{root}patch_embed.proj.weight"], w[f"{root}patch_embed.proj.bias"], stride=8)
    x = torch.cat([w[f"{root}cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{root}pos_embed"]
    for at in (f"{root}blocks.{i}." for i in range(2)):
        qkv = linear(w, f"{at}attn.qkv", norm(w, f"{at}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"{at}attn.proj", attend(*qkv))
        x = x + linear(w, f"{at}mlp.fc2", F.gelu(linear(w, f"{at}mlp.fc1", norm(w, f"{at}norm2", x, 1e-6))))
    return norm(w, f"{root}norm", x, 1e-6)


def text_tower(
    w: dict[str, Tensor], ids: Tensor, mask: Tensor, image: Tensor, root: str = "blip.text_encoder."
) -> Tensor:
    """Layer norms after each part, of eps 1e-12."""
    positions = w[f"{root}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = w[f"{root}embeddings.word_embeddings.weight"][ids] + positions
    x = norm(w, f"{root}embeddings.LayerNorm", x, 1e-12)
    for at in (f"{root}encoder.layer.{i}." for i in range(2)):
        x = looked(w, f"{at}attention.", x, x, mask)
        x = looked(w, f"{at}crossattention.", x, image, None)
        out = linear(w, f"{at}output.dense", F.gelu(linear(w, f"{at}intermediate.dense", x)))
        x = norm(w, f"{at}output.LayerNorm", x + out, 1e-12)
    return x


def looked(w: dict[str, Tensor], at: str, x: Tensor, source: Tensor, seen: Tensor | None) -> Tensor:
    """One attention of the text, on itself or on the image."""
    q, k, v = (linear(w, f"{at}self.{n}", y) for n, y in (("query", x), ("key", source), ("value", source)))
    out = linear(w, f"{at}output.dense", attend(q, k, v, seen))
    return norm(w, f"{at}output.LayerNorm", x + out, 1e-12)


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Heads of 64."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(2, 3) / 8
    if seen is not None:
        logits = logits.masked_fill(seen[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
