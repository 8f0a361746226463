"""Parameter shapes of the models whose memory and steps are measured. An optimizer sees nothing else of a model."""

import math
from collections.abc import Callable
from itertools import pairwise

__all__ = ["MODELS", "numel"]

Shapes = list[tuple[int, ...]]


def cnn() -> Shapes:
    """Three convolutions of 3 × 3 and a linear layer, for CIFAR-10."""
    channels = (3, 32, 64, 128)
    shapes: Shapes = []
    for before, after in pairwise(channels):
        shapes += [(after, before, 3, 3), (after,)]
    return [*shapes, (10, 128), (10,)]


def resnet18() -> Shapes:
    """ResNet-18 for ImageNet (arXiv 1512.03385): 11,689,512 parameters."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and width != before:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (1000, 512), (1000,)]


def encoder(layers: int, width: int, vocabulary: int, positions: int) -> Shapes:
    """A transformer like BERT (arXiv 1810.04805), with its pooler; its inner layers are four times as wide."""
    norm: Shapes = [(width,), (width,)]

    def linear(inputs: int, outputs: int) -> Shapes:
        return [(outputs, inputs), (outputs,)]

    layer = 4 * linear(width, width) + norm + linear(width, 4 * width) + linear(4 * width, width) + norm
    return [(vocabulary, width), (positions, width), (2, width), *norm, *layers * layer, *linear(width, width)]


def decoder() -> Shapes:
    """A transformer like Llama, in the sizes of TinyLlama (arXiv 2401.02385): 1,100,048,384 parameters."""
    width, inner, keys, layers, vocabulary = 2048, 5632, 256, 22, 32000
    attention: Shapes = [(width, width), (keys, width), (keys, width), (width, width)]
    layer = [*attention, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *layers * layer, (width,), (vocabulary, width)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "CNN, 95k": cnn,
    "small transformer, 4.3M": lambda: encoder(4, 256, 4096, 128),
    "ResNet-18, 11.7M": resnet18,
    "BERT-base, 109M": lambda: encoder(12, 768, 30522, 512),
    "TinyLlama, 1.1B": decoder,
    "one vector, 4.2M": lambda: [(1 << 22,)],
    "one vector, 16.8M": lambda: [(1 << 24,)],
}


def numel(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))
