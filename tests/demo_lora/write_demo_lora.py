"""Trains the five LoRAs beside it, one run's, which test_evaluate.py puts in order: minutes on two cores.

python tests/demo_lora/write_demo_lora.py
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import train_manga_lora as trainer  # noqa: E402
from lora_layers import save_lora_weights  # noqa: E402

RANK = 4  # the demo's 16 would be four times the file
RATE = 1e-3  # a quarter of the demo's, so that each step towards the ink can be seen
EPOCHS = {"eighth": 1, "quarter": 2, "half": 4, "three_quarters": 6, "finished": 8}


def keep(folder, unet, labels, state, config):
    for name, epoch in EPOCHS.items():
        if state.epoch == epoch:
            save_lora_weights(unet, HERE / f"{name}.safetensors", torch.float16, {"ss_epoch": epoch})
    keep_candidate(folder, unet, labels, state, config)


if __name__ == "__main__":
    keep_candidate = trainer.keep_candidate
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(trainer, "keep_candidate", keep):
        changes = {
            "demo": True,
            "output_dir": str(Path(folder, "out")),
            "lora_rank": RANK,
            "lora_alpha": 2 * RANK,
            "num_train_epochs": EPOCHS["finished"],
            "learning_rate": RATE,
            "sample_prompts": (),
        }
        trainer.main(trainer.TrainingConfig(**trainer.DEMO | changes))
