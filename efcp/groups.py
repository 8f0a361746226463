"""The usual split of a model's parameters: hidden matrices for the window; embeddings, head and vectors for AdamW."""

from typing import Any

from torch import Tensor, nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
POSITIONS = ("pos", "position", "positional", "embed", "embedding", "embeddings", "token", "wpe", "wte")
HEADS = ("head", "lm_head", "classifier", "fc_out", "output_projection", "score", "logits")


def param_groups(model: nn.Module, *, head: str | None = None, **adamw: Any) -> list[dict[str, Any]]:
    """Two param groups: what second-order information helps, and what is better left to AdamW.

    The second group, with `adamw=True`, has the parameters of fewer than two dimensions, those of embedding layers, the
    head, and parameters that a module holds itself under a name of positions or tokens. The first has all others:
    weights of linear layers, convolutions and attention.

    >>> optimizer = MFACW(efcp.param_groups(model), lr=1e-3)

    Args:
        model: of which the parameters that require gradients are taken.
        head: the name of the output layer, as in `model.named_modules()`. None takes a module called `lm_head`,
            `classifier` or the like; where there is none, the last layer that has a matrix.
        adamw: options of the second group, such as lr, or betas, (0.9, 0.999) by default.

    Returns:
        The groups, of named parameters; a group without parameters is left out.

    Raises:
        ValueError: if there is no module named `head`.
    """
    modules = dict(model.named_modules())
    if head is not None and head not in modules:
        raise ValueError(f"head must be the name of a module, got {head!r}")
    own = _head(modules) if head is None else head
    outside: set[Tensor] = set()
    for name, module in modules.items():
        if isinstance(module, EMBEDDINGS) or (own is not None and (name == own or name.startswith(f"{own}."))):
            outside |= set(module.parameters())
        for short, p in module.named_parameters(recurse=False):
            if p.dim() < 2 or not set(POSITIONS).isdisjoint(short.lower().split("_")):
                outside.add(p)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named if p not in outside]},
        {"params": [(name, p) for name, p in named if p in outside], "adamw": True, **adamw},
    ]
    return [group for group in groups if group["params"]]


def _head(modules: dict[str, nn.Module]) -> str | None:
    """The name of the output layer."""
    for name in modules:
        if name.rpartition(".")[2] in HEADS:
            return name
    layers = [name for name, module in modules.items() if _is_layer(module)]
    return layers[-1] if layers else None


def _is_layer(module: nn.Module) -> bool:
    """Whether a module holds a weight of two or more dimensions itself, and is no embedding."""
    own = module.parameters(recurse=False)
    return not isinstance(module, EMBEDDINGS) and any(p.dim() >= 2 for p in own)
