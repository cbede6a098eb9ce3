"""Somebody else's Lightning project, with one line added: the callback.

    pip install ./callbacks torchvision && python callbacks/examples/foreign_project.py

Trains torchvision's DeepLabV3 for a few steps on squares and discs drawn on noise. Nothing of
seglab is used. The line to copy is in `main`.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from scale_equalization import ScaleEqualizationCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large


class Shapes(Dataset[tuple[Tensor, Tensor]]):
    """Noise with one square (class 1) and one disc (class 2): image (3, 64, 64), mask (64, 64)."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(index)
        image = torch.randn(3, 64, 64, generator=draw)
        mask = torch.zeros(64, 64, dtype=torch.int64)
        y, x, v, u = torch.randint(12, 52, (4,), generator=draw).tolist()
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        mask[(rows - y).abs().maximum((columns - x).abs()) < 9] = 1
        mask[(rows - v) ** 2 + (columns - u) ** 2 < 100] = 2
        return image + mask, mask


class Segmentation(pl.LightningModule):
    """DeepLabV3 as its authors would write it: a dictionary comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.network = deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)["out"]
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        image, mask = batch
        loss = nn.functional.cross_entropy(self(image), mask)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train for two epochs; the table of branch scales comes first."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        callbacks=[ScaleEqualizationCallback()],  # <- the one line
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Segmentation(), DataLoader(Shapes(), batch_size=8, shuffle=True))


if __name__ == "__main__":
    main()
