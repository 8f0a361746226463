"""Training loops of others over sharded parameters."""

import os

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.networks import batch, full, mean_square, network, sparse


def lightning(rank, world, folder):
    """Lightning's ModelParallelStrategy with `fully_shard` in `configure_model`: the difference to a plain loop."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import ModelParallelStrategy

    os.environ |= {
        "TORCHELASTIC_RUN_ID": "tests",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29501",
    }

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.own = network()

        def configure_model(self):
            if not isinstance(self.own.up.weight, DTensor):
                for layer in (self.own.up, self.own.down):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.own, mesh=self.device_mesh["data_parallel"])

        def training_step(self, _, number):
            x, y = (t.chunk(world)[rank] for t in batch(number))
            return world * mean_square(self.own(x), y)

        def configure_optimizers(self):
            return sparse(self.own)

    module = Module()
    trainer = pl.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
        accelerator="cpu",
        devices=world,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(6), batch_size=1))
    whole = network()
    optimizer = sparse(whole, aligned=True)
    for step in range(6):
        whole.zero_grad()
        x, y = batch(step)
        mean_square(whole(x), y).backward()
        optimizer.step()
    sharded = isinstance(module.own.up.weight, DTensor)
    with torch.no_grad():
        pairs = zip(module.own.parameters(), whole.parameters(), strict=True)
        return sharded, max(float((full(p) - q).abs().max()) for p, q in pairs)
