"""PyTorch Lightning: automatic optimization with a scheduler, stopped and resumed from a checkpoint."""

import warnings

import pytest
import torch
from torch import nn

from efcp import SparseGGT, SparseMFAC
from tests.contract.optimizers import small

pl = pytest.importorskip("pytorch_lightning")


class Tiny(pl.LightningModule):
    def __init__(self, cls):
        super().__init__()
        torch.manual_seed(1)
        self.layers, self.cls = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), cls

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self):
        optimizer = self.cls(self.parameters(), **small(self.cls), momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def train(module, folder, epochs, resume=None):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 6, generator=generator)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers in a data loader
        trainer.fit(module, loader, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return trainer


@pytest.mark.parametrize("cls", [SparseMFAC, SparseGGT])
def test_resuming_is_not_stopping(tmp_path, cls):
    whole, first, resumed = Tiny(cls), Tiny(cls), Tiny(cls)
    trainer = train(whole, tmp_path, 4)
    train(first, tmp_path, 2).save_checkpoint(tmp_path / "stopped.ckpt")
    again = train(resumed, tmp_path, 4, resume=tmp_path / "stopped.ckpt")
    assert trainer.global_step == again.global_step == 12
    for p, q, r in zip(whole.parameters(), resumed.parameters(), first.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)
    left, right = (t.optimizers[0].state_dict()["state"] for t in (trainer, again))
    for key, state in left.items():
        for name, value in state.items():
            other = right[key][name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other
