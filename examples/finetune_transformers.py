"""Hugging Face's Trainer with SparseMFAC: which chapter of Python's reference is a paragraph from?

    python examples/finetune_transformers.py

The texts are the help pages that come with Python (`help("compound")`), so nothing is downloaded. The network, a small
BERT, starts from random weights, and its tokens are the words of the training paragraphs. To fine-tune a pretrained
network, use `from_pretrained` for the network and the tokenizer. The program prints the test accuracies of AdamW and
SparseMFAC after the same number of epochs. AdamW is ahead here, with every learning rate and damping that we tried: for
transformers from random weights we do not recommend SparseMFAC. The example shows how to plug it in.
"""

import argparse
import random
import re
import tempfile
from collections import Counter
from pydoc_data.topics import topics

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from efcp import SparseMFAC

CHAPTERS = ("compound", "debugger", "specialnames", "string-methods", "types")
LENGTH = 32  # tokens of a paragraph that are read
BATCH = 32
PADDING, UNKNOWN = 0, 1

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--train-size", type=int, help="paragraphs to train on; all but the fifth for testing by default")
arguments = parser.parse_args()

paragraphs = [
    (words, label)
    for label, chapter in enumerate(CHAPTERS)
    for paragraph in topics[chapter].split("\n\n")
    if len(words := re.findall(r"\w+", paragraph.lower())) >= 8
]
random.Random(0).shuffle(paragraphs)
test, train = paragraphs[: len(paragraphs) // 5], paragraphs[len(paragraphs) // 5 :][: arguments.train_size]

counts = Counter(word for words, _ in train for word in words)
vocabulary = {word: number for number, (word, _) in enumerate(counts.most_common(2000), start=2)}


def encoded(paragraphs: list[tuple[list[str], int]]) -> list[dict[str, object]]:
    """The inputs of BERT: ids padded to `LENGTH`, a mask of those that are not padding, and the label."""
    rows = []
    for words, label in paragraphs:
        ids = [vocabulary.get(word, UNKNOWN) for word in words[:LENGTH]]
        padding = LENGTH - len(ids)
        mask = [1] * len(ids) + [0] * padding
        rows.append({"input_ids": ids + [PADDING] * padding, "attention_mask": mask, "labels": label})
    return rows


def accuracy(name: str) -> float:
    """The test accuracy, in per cent, after training with the optimizer of that name."""
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary) + 2,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=len(CHAPTERS),
    )
    model = BertForSequenceClassification(config)
    if name == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = SparseMFAC(model.parameters(), lr=0.01, window=32, density=0.02, damping=1e-2)
    steps = arguments.epochs * -(-len(train) // BATCH)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=BATCH,
                save_strategy="no",
                logging_strategy="epoch",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=encoded(train),
            optimizers=(optimizer, scheduler),
        )
        trainer.train()
        logits = torch.from_numpy(trainer.predict(encoded(test)).predictions)
    return 100 * (logits.argmax(1) == torch.tensor([label for _, label in test])).double().mean().item()


accuracies = {name: accuracy(name) for name in ("AdamW", "SparseMFAC")}
print(f"{len(train)} paragraphs to train on, {len(test)} to test; the largest chapter has ", end="")
print(f"{100 * max(Counter(label for _, label in test).values()) / len(test):.0f}% of these")
for name, value in accuracies.items():
    print(f"{name}: test accuracy {value:.1f}%")
