"""Features of Fashion-MNIST by a frozen EfficientNet-Lite0, kept on disk, and the linear probe on them.

An image is resized to 96 × 96 pixels (bilinear), repeated in three channels, and goes through the network once. Splits
are those of `efcp.analysis.data`. The features of the default splits take two to three minutes on two cores.

The cache has a folder for each pair of an image file and weights. A file in it holds the features of `CHUNK` images in
the fixed order of the splits, so that after an interruption, or for more images, only what is missing is computed.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from efcp.analysis.data import CLASSES, DataSet, Split, find_fashion_mnist, first, read_pair, stratified_order
from efcp.analysis.efficientnet import FEATURES, efficientnet_lite0, load_weights, weights_path

NAME = "fashion-mnist-features"
CHUNK = 500
_PIXELS = 96
_BATCH = 16  # larger ones leave the caches of a core, and are slower
_RECIPE = 1  # raise it when `compute_features` returns something else, so that older caches are not used


def load_features(directory: Path | None = None, train_size: int | None = None, cache: Path | None = None) -> DataSet:
    """Fashion-MNIST as features (n, 1280) float32; 5,000 images for validation, 10,000 for test.

    Every feature has mean 0 over the training split. All are divided by the same number, so that their variances there
    are 1 on average. (Divided each by its own standard deviation, some that hardly vary would become as large as 70.)

    Args:
        directory: folder of Fashion-MNIST, as for `efcp.analysis.data.load_data`.
        train_size: training images, at most 55,000; None for 20,000.
        cache: where features are kept; None for `$XDG_CACHE_HOME/efcp` or `~/.cache/efcp`.

    Raises:
        FileNotFoundError: where images or weights are missing; it says how to get them.
        ValueError: for a corrupted file, or more training images than there are.
    """
    folder, weights = find_fashion_mnist(directory), weights_path()
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efcp"
    images, labels = read_pair(folder, "train")
    order = stratified_order(labels)
    size = len(order) // 12
    validation, train = order[:size], first(order[size:], train_size, 20_000)
    features = cached_features(images[order], size + len(train), weights, cache)
    test_images, test_labels = read_pair(folder, "test")
    test_order = stratified_order(test_labels)
    test_features = cached_features(test_images[test_order], len(test_order), weights, cache)
    variance, mean = torch.var_mean(features[size:], 0, correction=0)
    std = variance.mean().sqrt()
    return DataSet(
        NAME,
        Split((features[size:] - mean) / std, labels[train]),
        Split((features[:size] - mean) / std, labels[validation]),
        Split((test_features - mean) / std, test_labels[test_order]),
    )


def linear_probe(classes: int = CLASSES) -> nn.Linear:
    """Features (n, 1280) to logits (n, classes). It starts at zero: its loss is convex, and needs no seed."""
    probe = nn.Linear(FEATURES, classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    return probe


def cached_features(images: Tensor, count: int, weights: Path, cache: Path) -> Tensor:
    """The features (count, 1280) float32 of the first images, read from the cache or computed and added to it.

    Args:
        images: (n, height, width) uint8.
        count: at most n.
        weights: the network's.
        cache: a folder, made if need be.
    """
    key = hashlib.sha256(f"recipe {_RECIPE}, chunk {CHUNK}".encode())
    key.update(images.numpy().tobytes())  # in C order
    key.update(weights.read_bytes())
    folder = cache / f"{NAME}-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {start: folder / f"{start:05}.npy" for start in range(0, count, CHUNK)}
    missing = [start for start, file in files.items() if not file.is_file()]
    if missing:
        network = load_weights(efficientnet_lite0(), weights)
        for start in tqdm(missing, desc="features", unit=f"{CHUNK} images"):
            _write(files[start], compute_features(network, images[start : start + CHUNK]))
    return torch.from_numpy(np.concatenate([np.load(file) for file in files.values()])[:count])


@torch.inference_mode()
def compute_features(network: nn.Module, images: Tensor) -> Tensor:
    """Computes the network's features, (n, 1280) float32, of images (n, height, width) uint8."""
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = []
    for batch in images.split(_BATCH):
        pixels = F.interpolate(batch.unsqueeze(1).float(), size=(_PIXELS, _PIXELS), mode="bilinear")
        inputs = ((pixels - 127) / 128).expand(-1, 3, -1, -1)
        features.append(network(inputs.contiguous(memory_format=torch.channels_last)))
    return torch.cat(features)


def _write(path: Path, features: Tensor) -> None:
    """Writes a file whole or not at all, also where two processes write the same one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        np.save(file, features.numpy())
    Path(file.name).replace(path)
