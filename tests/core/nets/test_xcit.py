"""XCiT at patch 4: the names and shapes of the published checkpoints, and how many patches it sees."""

import pytest
import torch

from darht.core.nets import build
from darht.core.nets.xcit import SIZES

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def batch_norm(name, channels):
    return {f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in NORM}


def published(D, heads, depth, num_classes):
    """Names and shapes of a checkpoint of width D, such as debenedetti2022light-xcit-s-cifar10-linf.pth.tar."""
    expected, before = {"cls_token": (1, 1, D)}, 3
    for index, after in enumerate([D // 8, D // 4, D // 2, D]):
        name = f"patch_embed.proj.{2 * index}"
        expected |= {f"{name}.0.weight": (after, before, 3, 3), **batch_norm(f"{name}.1", after)}
        before = after
    expected |= affine("pos_embed.token_projection", D, 64, 1, 1)
    for index in range(depth):
        name = f"blocks.{index}"
        expected |= {f"{name}.gamma{number}": (D,) for number in (1, 2, 3)}
        expected |= {key: value for number in (1, 2, 3) for key, value in affine(f"{name}.norm{number}", D).items()}
        expected |= {f"{name}.attn.temperature": (heads, 1, 1), **affine(f"{name}.attn.qkv", 3 * D, D)}
        expected |= {**affine(f"{name}.attn.proj", D, D), **affine(f"{name}.local_mp.conv1", D, 1, 3, 3)}
        expected |= {**batch_norm(f"{name}.local_mp.bn", D), **affine(f"{name}.local_mp.conv2", D, 1, 3, 3)}
        expected |= {**affine(f"{name}.mlp.fc1", 4 * D, D), **affine(f"{name}.mlp.fc2", D, 4 * D)}
    for index in range(2):
        name = f"cls_attn_blocks.{index}"
        expected |= {f"{name}.gamma{number}": (D,) for number in (1, 2)}
        expected |= {**affine(f"{name}.norm1", D), **affine(f"{name}.norm2", D)}
        expected |= {key: value for part in "qkv" for key, value in affine(f"{name}.attn.{part}", D, D).items()}
        expected |= {**affine(f"{name}.attn.proj", D, D), **affine(f"{name}.mlp.fc1", 4 * D, D)}
        expected |= affine(f"{name}.mlp.fc2", D, 4 * D)
    return expected | affine("norm", D) | affine("head", num_classes, D)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_of_the_published_checkpoints(size):
    with torch.device("meta"):
        model = build(f"xcit-{size}-p4", 10, {"depth": 2})
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published(*SIZES[size], 2, 10)


def test_an_image_is_cut_into_patches_of_four_pixels():
    model = build("xcit-s12-p4", 10, {"width": 8, "heads": 2, "depth": 1})
    _, grid = model.patch_embed(torch.zeros(1, 3, 32, 32))
    assert tuple(grid) == (8, 8)
