"""Tasks: what is trained on what, for how long. Each is a data set, a network and a loss.

network            data sets                              loss
small-cnn          mnist5k, fashion-mnist, cifar10        cross-entropy
resnet20           the same                               the same
linear-probe       fashion-mnist-features                 cross-entropy + l2/2 ‖θ‖²: strictly convex
minilm             movie-reviews                          cross-entropy
autoencoder        mnist5k-pixels, fashion-mnist-pixels   binary cross-entropy of an image's pixels
conv-autoencoder   the same                               the same
gpt                python-library                         cross-entropy of the next byte
pinn               an equation, as efcp.analysis.pinns    mean square of what the equation and its conditions lack
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efcp.analysis import pinns
from efcp.analysis.autoencoders import autoencoder, conv_autoencoder, reconstruction_loss, with_pixels
from efcp.analysis.data import NAMES, DataSet, Split, load_data
from efcp.analysis.gpt import GPT
from efcp.analysis.models import resnet20, small_cnn

IMAGES = (*NAMES, "cifar10")
DATA_SETS = {
    "small-cnn": IMAGES,
    "resnet20": IMAGES,
    "linear-probe": ("fashion-mnist-features",),
    "minilm": ("movie-reviews",),
    "autoencoder": tuple(f"{name}-pixels" for name in NAMES),
    "conv-autoencoder": tuple(f"{name}-pixels" for name in NAMES),
    "gpt": ("python-library",),
    "pinn": pinns.DATA_SETS,
}
"""The networks, and what each can learn from."""
EVALUATED = 500
"""The number of examples that are evaluated at once."""
DECAYS = ("linear", "cosine")
"""Shapes of the learning rate's way down to 0."""
WITHOUT_CLASSES = ("autoencoder", "conv-autoencoder", "gpt", "pinn")
"""Networks without an accuracy."""


@dataclass(frozen=True)
class Task:
    """A network, the data that it is trained on, and for how long.

    Attributes:
        network: one of `DATA_SETS`.
        data_set: one that the network can learn from.
        input_shape: of one example.
        train_size: training examples.
        epochs: passes over them.
        batch_size: examples of a step.
        width: channels of the first layer of an image network; of GPT's residual stream; of the layers of a PINN.
        layers: of MiniLM that are kept; of GPT; hidden ones of a PINN.
        l2: weight of ‖θ‖²/2 in the loss.
        warm_up: share of the steps over which the learning rate rises, before it falls.
        decay: how it falls to 0, one of `DECAYS`.
        evaluations: points of the learning curve of a final run.
        diagnostics: steps of a run on which the update is looked at.
    """

    network: str
    data_set: str
    input_shape: tuple[int, ...]
    train_size: int
    epochs: int
    batch_size: int
    width: int | None = None
    layers: int | None = None
    l2: float = 0.0
    warm_up: float = 0.0
    decay: str = "linear"
    evaluations: int = 0
    diagnostics: int = 0

    def model(self, seed: int) -> nn.Module:
        """The network as initialised from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._model()

    def _model(self) -> nn.Module:
        if self.network == "small-cnn":
            assert self.width is not None
            channels, height, width = self.input_shape
            return small_cnn(self.width, (height, width), channels)
        if self.network == "resnet20":
            assert self.width is not None
            return resnet20(self.width, self.input_shape[0])
        if self.network == "linear-probe":
            from efcp.analysis.features import linear_probe

            return linear_probe()
        if self.network == "autoencoder":
            return autoencoder(math.prod(self.input_shape))
        if self.network == "conv-autoencoder":
            assert self.width is not None
            return conv_autoencoder(self.width)
        if self.network == "gpt":
            assert self.width is not None
            assert self.layers is not None
            return GPT(self.width, self.layers, self.input_shape[0])
        if self.network == "pinn":
            assert self.width is not None
            assert self.layers is not None
            return pinns.pinn(self.data_set, self.width, self.layers)
        from efcp.analysis.minilm import minilm_classifier

        assert self.layers is not None
        return minilm_classifier(self.layers)

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, which training minimises: ()."""
        if self.network.endswith("autoencoder"):
            return reconstruction_loss(model, inputs)
        if self.network == "gpt":
            return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        if self.network == "pinn":
            return pinns.loss(self.data_set, model, inputs)
        loss = F.cross_entropy(model(inputs), labels)
        if self.l2:
            loss = loss + self.l2 / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return loss

    @torch.no_grad()
    def error(self, model: nn.Module, split: Split) -> float:
        """Returns what runs without classes are compared by: the mean loss, or the relative error of a PINN."""
        if self.network == "pinn":
            return pinns.relative_error(self.data_set, model, split)
        pairs = zip(split.inputs.split(EVALUATED), split.labels.split(EVALUATED), strict=True)
        total = sum(self.loss(model, inputs, labels).item() * len(inputs) for inputs, labels in pairs)
        return total / len(split.inputs)

    @property
    def has_classes(self) -> bool:
        """Whether there is an accuracy, by which runs are compared; else they are by their `error`."""
        return self.network not in WITHOUT_CLASSES

    def factor(self, step: int, steps: int) -> float:
        """The factor of the learning rate: it rises linearly over the warm-up, then falls to 0."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return (step + 1) / rising
        left = (steps - step) / (steps - rising)
        return (1 - math.cos(math.pi * left)) / 2 if self.decay == "cosine" else left


def load_task_data(data_set: str, train_size: int | None, directory: Path | None = None) -> DataSet:
    """The data set of a task by name.

    Raises:
        ValueError: for another name.
        FileNotFoundError: where files are missing.
    """
    if data_set == "fashion-mnist-features":
        from efcp.analysis.features import load_features

        return load_features(directory, train_size)
    if data_set == "movie-reviews":
        from efcp.analysis.text import load_text

        return load_text(directory, train_size)
    if data_set == "cifar10":
        from efcp.analysis.cifar import load_cifar10

        return load_cifar10(directory, train_size)
    if data_set in pinns.DATA_SETS:
        return pinns.load_points(data_set, train_size)
    if data_set == "python-library":
        from efcp.analysis.source import load_source

        return load_source(train_size)
    if data_set.endswith("-pixels"):
        return with_pixels(load_data(data_set.removesuffix("-pixels"), directory, train_size))
    return load_data(data_set, directory, train_size)
