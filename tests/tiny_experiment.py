"""The smallest experiment that trains, validates and saves."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "data": {
        "class_path": "seglab.data.ScenesDataModule",
        "init_args": {
            "size": 32,
            "train_length": 8,
            "val_length": 5,
            "batch_size": 4,
            "num_workers": 0,
        },
    },
    "model": {
        "network": {
            "class_path": "seglab.models.Segmenter",
            "init_args": {
                "encoder": {
                    "class_path": "seglab.models.TimmEncoder",
                    "init_args": {"name": "test_resnet"},
                },
                "head": {
                    "class_path": "seglab.models.heads.UPerHead",
                    "init_args": {"channels": 8},
                },
            },
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
        "scheduler": {"class_path": "seglab.optim.WarmupPolyLR"},
    },
    "scale_equalization": {"max_batches": 2, "verbose": False},
}
