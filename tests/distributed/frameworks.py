"""Training loops of others over sharded parameters."""

import os

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.networks import batch, full, mean_square, network, sparse


def environment(rank, world):
    """What torchrun sets."""
    return {
        "TORCHELASTIC_RUN_ID": "tests",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29501",
    }


def lightning(rank, world, folder):
    """Lightning's ModelParallelStrategy with `fully_shard` in `configure_model`: the difference to a plain loop."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import ModelParallelStrategy

    os.environ |= environment(rank, world)

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


def trainer(rank, world, folder):
    """Hugging Face's Trainer over DistributedDataParallel with divided state: the difference to a plain loop."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import Trainer, TrainingArguments

    os.environ |= environment(rank, world)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = network()
            del self.own.unused

        def forward(self, x, y):
            return {"loss": mean_square(self.own(x), y) * (8 / len(x))}  # the mean over those examples

    def data():
        return [{"x": batch(n)[0][k], "y": batch(n)[1][k]} for n in range(3) for k in range(4)]

    model, whole = Own(), network()
    del whole.unused
    optimizer = sparse(model, mesh=init_device_mesh("cpu", (world,)))
    arguments = TrainingArguments(
        output_dir=str(folder / f"trainer{rank}"),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=4 // world,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    InOrder(model, arguments, train_dataset=data(), optimizers=(optimizer, constant)).train()
    other = sparse(whole, aligned=True)
    for step in range(3):
        whole.zero_grad()
        x, y = batch(step)
        (mean_square(whole(x), y) * 2).backward()
        other.step()
    divided = isinstance(optimizer.state[model.own.up.weight]["values"], DTensor)
    with torch.no_grad():
        pairs = zip(model.own.parameters(), whole.parameters(), strict=True)
        return divided, max(float((p - q).abs().max()) for p, q in pairs)
