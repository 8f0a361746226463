"""A small transformer, sharded with FSDP2 over processes; saves, and resumes on another number of them.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --steps 150 --save checkpoint
    torchrun --standalone --nproc-per-node 4 examples/fsdp2.py --steps 250 --load checkpoint

It reads bytes of the help pages that come with Python (`help("compound")`) and predicts the next one. Only two lines
differ from training with AdamW: the import and the constructor. Processes are on the CPU; for GPUs, replace "cpu" and
"gloo" by "cuda" and "nccl" and set the device of each process.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import efcp

CONTEXT, WIDTH, LAYERS, HEADS, BATCH = 64, 96, 3, 4, 32  # BATCH over all processes

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=150, help="the step to train up to")
parser.add_argument("--load", type=Path, help="folder of the checkpoint to go on from")
parser.add_argument("--save", type=Path, help="folder for a checkpoint at the end")
arguments = parser.parse_args()


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.positions(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    """The mean cross-entropy, in nats a byte, of the next bytes in windows of the text."""
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main() -> None:
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    text = torch.frombuffer(bytearray("\n".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.uint8)
    training, validation = text[: -len(text) // 10].long(), text[-len(text) // 10 :].long()

    torch.manual_seed(0)  # the same on all processes
    model = Transformer()
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = efcp.SparseMFAC(
        model.parameters(),
        lr=3e-3,
        window=32,
        density=0.02,
        direction="momentum",  # AdamW's scale
        momentum=0.9,
        update_rms=0.2,
        damping=0.1,
        relative_damping=True,
    )

    first = torch.zeros((), dtype=torch.int64)
    if arguments.load:
        names = ("model", "optimizer")
        state = {**dict(zip(names, get_state_dict(model, optimizer), strict=True)), "steps": first}
        dcp.load(state, checkpoint_id=arguments.load)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = state["steps"]

    def report(step: int) -> None:
        with torch.no_grad():
            starts = torch.arange(0, len(validation) - CONTEXT - 1, (len(validation) - CONTEXT) // 128)
            loss = loss_of(model, validation, starts)
        if rank == 0:
            print(f"{ranks} processes, step {step}: validation loss {loss:.4f} nats a byte", flush=True)

    report(int(first))
    for step in range(int(first), arguments.steps):
        torch.manual_seed(step)
        starts = torch.randint(len(training) - CONTEXT - 1, (BATCH,))
        optimizer.zero_grad()
        loss_of(model, training, starts[rank::ranks]).backward()
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == arguments.steps:
            report(step + 1)

    if rank == 0:
        memory = efcp.memory_report(optimizer)
        print(f"{memory.total:,} bytes of state on each process, {memory.per_parameter:.2f} a parameter of its share")
    if arguments.save:
        own = get_state_dict(model, optimizer)
        dcp.save(
            {"model": own[0], "optimizer": own[1], "steps": torch.tensor(arguments.steps)}, checkpoint_id=arguments.save
        )
    distributed.destroy_process_group()


main()
