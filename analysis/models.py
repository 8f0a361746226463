"""Small networks for images."""

from torch import nn

from efcp.analysis.data import CLASSES


def small_cnn(width: int, image_size: tuple[int, int] = (28, 28)) -> nn.Sequential:
    """Two 3 × 3 convolutions of stride 2 and two linear layers: (n, 1, height, width) to logits (n, 10).

    At width 16 and 28 × 28 pixels it has 105,866 parameters.

    Args:
        width: channels of the first convolution; the second has twice, the hidden layer four times as many.
        image_size: height and width of the images.
    """
    height, breadth = ((size + 3) // 4 for size in image_size)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * height * breadth, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, CLASSES),
    )
