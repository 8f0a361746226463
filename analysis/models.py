"""Small networks for images."""

import torch.nn.functional as F
from torch import Tensor, nn

from efcp.analysis.data import CLASSES


def small_cnn(width: int, image_size: tuple[int, int] = (28, 28), channels: int = 1) -> nn.Sequential:
    """Two 3 × 3 convolutions of stride 2 and two linear layers: (n, channels, height, width) to logits (n, 10).

    At width 16 and 28 × 28 pixels of one channel it has 105,866 parameters.

    Args:
        width: channels of the first convolution; the second has twice, the hidden layer four times as many.
        image_size: height and width of the images.
        channels: of the images.
    """
    height, breadth = ((size + 3) // 4 for size in image_size)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * height * breadth, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, CLASSES),
    )


def resnet20(width: int = 16, channels: int = 1) -> nn.Sequential:
    """ResNet-20 for small images: (n, channels, height, width) to logits (n, 10) (He et al., arXiv 1512.03385, 4.2).

    Three stages of three blocks at width, 2 · width and 4 · width channels; shortcuts between stages are 1 × 1
    convolutions. At width 16 it has 272,186 parameters for one channel, 272,474 for three.

    Args:
        width: channels of the first stage.
        channels: of the images.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for after in (width, 2 * width, 4 * width):
        for stride in (1 if after == width else 2, 1, 1):
            layers.append(_Block(before, after, stride))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


class _Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, which is a 1 × 1 convolution where shapes differ."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.residual(inputs) + self.shortcut(inputs))
