"""Pictures where long-range context helps: a BiFPN up to P4 and one up to P7 on generated scenes.

    python benchmarks/long_range.py --figure docs/long_range.png

In scenes of 128 pixels a grey slab is a gate or a door by the colour of a beacon at the other side
of the picture, and a blue blob a lake or an oasis by what lies around it (`seglab.data.scenes`).
The encoder is a ResNet-10 cut off at stride 16, so that it cannot see from one side to the other by
itself; both networks are trained for the same steps on the same scenes from the same seed, the
coarse levels being all that differs. Reach: the columns, of 256, that the middle pixel's logits
take from, counted as in `context.py` by making one column NaN after another.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from seglab.data import ScenesDataModule
from seglab.losses import CrossEntropy
from seglab.metrics import SegmentationMetrics
from seglab.models import Segmenter, TimmEncoder
from seglab.models.encoders import Encoder
from seglab.models.heads import BiFPNHead
from seglab.visualize import color_table, save_picture

SIZE, BATCH, LEVELS = 128, 8, ((2, 4), (2, 7))
CLASS_WEIGHT = [0.2, 1, 1, 2, 2, 1, 1, 1]  # as in configs/quickstart.yaml
SHOWN = ("lake", "oasis", "gate", "door")


class CutEncoder(Encoder):
    """A ResNet-10 without its last stage: strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = TimmEncoder("resnet10t")
        self.whole.model.layer4 = torch.nn.Identity()
        self.channels, self.strides = self.whole.channels[:3], self.whole.strides[:3]

    def forward(self, image: Tensor) -> list[Tensor]:
        """The three finest levels."""
        return list(self.whole(image)[:3])


def build(levels: tuple[int, int]) -> Segmenter:
    """The same encoder and width for each."""
    torch.manual_seed(0)
    encoder = CutEncoder()
    head = BiFPNHead(encoder.channels, 8, channels=48, repeats=1, levels=levels, head_repeats=1)
    return Segmenter(encoder, head)


def columns_that_reach(network: Segmenter, width: int = 256, step: int = 4) -> int:
    """Columns of the image between the first and the last from which the middle pixel takes."""
    network.eval()
    reached = []
    with torch.inference_mode():
        for column in range(0, width, step):
            image = torch.zeros(1, 3, 64, width)
            image[..., column] = float("nan")
            if network(image)[0, :, 32, width // 2].isnan().any():
                reached.append(column)
    return reached[-1] - reached[0] + step


def train(network: Segmenter, data: ScenesDataModule, steps: int) -> None:
    """AdamW with a linear warm-up and a polynomial end."""
    network.train()
    loss_of = CrossEntropy(class_weight=CLASS_WEIGHT)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (1 - step / steps) ** 0.9)
    )
    for step, batch in zip(range(steps), data.train_dataloader(), strict=False):
        loss = loss_of(network(batch["image"]), batch["mask"].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def predict(network: Segmenter, images: Tensor) -> Tensor:
    """Class ids, (B, H, W)."""
    with torch.inference_mode():
        return network.eval()(images).argmax(1)


def evaluate(network: Segmenter, data: ScenesDataModule) -> dict[str, float]:
    """IoU of the classes that are shown, and of all, in percent."""
    metrics = SegmentationMetrics(8)
    for batch in data.val_dataloader():
        metrics.update(predict(network, batch["image"]), batch["mask"])
    found = metrics.compute()
    each = dict(zip(data.class_names, found["IoU"].tolist(), strict=True))
    return {name: 100 * value for name, value in {**each, "mean": found["mIoU"]}.items()}


def draw(networks: list[Segmenter], data: ScenesDataModule, path: str, n: int = 6) -> None:
    """Scenes that hold a gate or a door: image, label, what each network says."""
    shown = [item for item in data.val_dataset if np.isin(item["mask"], (3, 4)).sum() > 300][:n]
    images = torch.stack([torch.as_tensor(item["image"]) for item in shown])
    labels = [np.asarray(item["mask"]) for item in shown]
    table = color_table(data.palette, 8)
    answers = [predict(network, images).numpy().astype(np.uint8) for network in networks]
    rows = []
    for i, label in enumerate(labels):
        masks = [label, *(np.where(label == 255, 255, answer[i]) for answer in answers)]
        cells = [images[i].permute(1, 2, 0).numpy()]
        cells += [table[mask] for mask in masks]
        rows.append(np.concatenate([np.pad(c, ((2, 2), (2, 2), (0, 0))) for c in cells], axis=1))
    picture = np.concatenate(rows).repeat(2, 0).repeat(2, 1)
    save_picture(path, picture.astype(np.uint8))
    print(f"{path}: image, label, {', '.join(f'P{a} to P{b}' for a, b in LEVELS)}")


def main() -> None:
    """Train both, print the table, draw the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", help="write the picture to this PNG file")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks, rows = [], []
    for levels in LEVELS:
        data = ScenesDataModule(
            size=SIZE, batch_size=BATCH, train_length=BATCH * options.steps, num_workers=0
        )
        data.setup("fit")
        network, start = build(levels), time.process_time()
        train(network, data, options.steps)
        found = evaluate(network, data)
        cells = [f"P{levels[0]} to P{levels[1]}", str(columns_that_reach(build(levels)))]
        cells += [f"{found[name]:.1f}" for name in (*SHOWN, "mean")]
        rows.append(" | ".join([*cells, f"{time.process_time() - start:.0f}"]))
        networks.append(network)
    print(f"| levels | reach, of 256 | {' | '.join(SHOWN)} | mean | CPU seconds |")
    print("|---|" + "--:|" * (len(SHOWN) + 3))
    print("\n".join(f"| {row} |" for row in rows))
    if options.figure:
        draw(networks, data, options.figure)


if __name__ == "__main__":
    main()
