"""Hugging Face's Trainer: `Trainer(..., optimizers=(optimizer, scheduler))`, stopped and resumed from a checkpoint.

Accelerate wraps the optimizer: it loads `optimizer.state_dict()` moved to its device right away (here a state without
tensors), and passes `step`, `zero_grad`, `state_dict` and `load_state_dict` on. The checkpoint holds `optimizer.pt`,
which Trainer reads with weights_only.
"""

import pytest
import torch
from torch import nn

from efcp import SparseMFAC

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def language_model():
    """One layer of GPT-2, 16 wide, with dropout; the embedding is tied to the last layer."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def train(model, folder, *, resume=None, stop=None, **arguments):
    generator = torch.Generator().manual_seed(2)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(32, (40, 8), generator=generator)]
    options = {"window": 4, "density": 0.2, "block_size": 16, "damping": 0.1, "momentum": 0.5}
    optimizer = SparseMFAC(model.parameters(), lr=0.02, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop:
                control.should_training_stop = True

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=12,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=6,
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
            **arguments,
        ),
        train_dataset=data,
        optimizers=(optimizer, scheduler),
        callbacks=[Stop()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return optimizer, trainer


def same(a, b):
    """Whether two nests of dicts and lists hold the same values, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_resuming_is_not_stopping(tmp_path):
    model, resumed = language_model(), language_model()
    optimizer, trainer = train(model, tmp_path / "whole", gradient_accumulation_steps=2, max_grad_norm=0.5)
    train(language_model(), tmp_path / "parts", gradient_accumulation_steps=2, max_grad_norm=0.5, stop=6)
    checkpoint = tmp_path / "parts" / "checkpoint-6"
    assert (checkpoint / "optimizer.pt").exists()
    again, _ = train(
        resumed, tmp_path / "parts", gradient_accumulation_steps=2, max_grad_norm=0.5, resume=str(checkpoint)
    )
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    assert int(optimizer.shared["step"]) == 12
    assert same(model.state_dict(), resumed.state_dict())
    assert same(optimizer.state_dict(), again.state_dict())


def test_accelerate_wraps_an_optimizer_that_has_state():
    """`prepare` loads the state moved to the device: nothing is cast."""
    from accelerate import Accelerator

    model = nn.Linear(6, 3).bfloat16()
    optimizer = SparseMFAC(model.parameters(), window=4, density=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 6, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
    before = optimizer.state_dict()
    _, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    assert same(before, wrapped.state_dict())
    assert wrapped.optimizer is optimizer
