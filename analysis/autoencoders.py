"""Autoencoders of images with pixels in [0, 1]: the benchmark on which second-order methods were first compared."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efcp.analysis.data import DataSet, Split

WIDTHS = (1000, 500, 250, 30)


def autoencoder(pixels: int = 784) -> nn.Sequential:
    """A deep autoencoder: pixels-1000-500-250-30 and back (Hinton and Salakhutdinov, 2006).

    Images (n, 1, height, width) to logits of the same shape. With 784 pixels it has 2,837,314 parameters.
    """
    sizes = (pixels, *WIDTHS, *WIDTHS[-2::-1], pixels)
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if number not in (len(WIDTHS) - 1, len(sizes) - 2):  # the code and the logits are linear
            layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


def conv_autoencoder(width: int = 16, code: int = 16) -> nn.Sequential:
    """Two 3 × 3 convolutions of stride 2, a code, and back: images (n, 1, 28, 28) to logits of the same shape.

    Args:
        width: channels of the first convolution; the second has twice as many.
        code: numbers that an image is compressed to.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * width * 49, code),
        nn.Linear(code, 2 * width * 49),
        nn.Tanh(),
        nn.Unflatten(1, (2 * width, 7, 7)),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
    )


def reconstruction_loss(model: nn.Module, images: Tensor) -> Tensor:
    """The binary cross-entropy of pixels, summed over an image and averaged over images, in nats: ()."""
    logits = model(images).view_as(images)
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def with_pixels(data: DataSet) -> DataSet:
    """A set of normalised images with its pixels scaled to [0, 1] again."""
    low = data.train.inputs.min()
    high = torch.maximum(data.train.inputs.max(), low + 1e-6)
    splits = (data.train, data.validation, data.test)
    scaled = (Split(((s.inputs - low) / (high - low)).clamp(0, 1), s.labels) for s in splits)
    return DataSet(f"{data.name}-pixels", *scaled)
