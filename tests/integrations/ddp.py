"""One of the processes of a training with the Hugging Face Trainer: writes its final weights."""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import Trainer

from tests.integrations.test_hf import NEW, OLD, arguments, model_of, rows_of
from tritter.data.batches import this_rank
from tritter.integrations.hf import with_forgetting
from tritter.methods.forgetting import EWC, SI, Distill, Replay


def train(folder: Path) -> None:
    """Train on 4 rows a micro-batch, all processes together."""
    methods = [EWC(ewc_lambda=10.0, refresh_steps=2), SI(), Distill(), Replay(fraction=0.5)]
    size = 4 // int(os.environ.get("WORLD_SIZE", 1))
    trainer = with_forgetting(Trainer, methods)(
        model_of(),
        arguments(
            folder,
            max_steps=12,  # two more than an epoch has, as the order of the rows follows the epoch
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
        ),
        train_dataset=rows_of(NEW),
        old_data=rows_of(OLD),
    )
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    save_file(weights, folder / f"rank_{this_rank()}")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
