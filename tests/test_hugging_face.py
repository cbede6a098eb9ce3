"""The README's lines for the Hugging Face Trainer, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

README = Path(__file__).parents[1] / "callbacks" / "README.md"


@pytest.mark.slow
def test_lines_for_the_hugging_face_trainer_run() -> None:
    transformers = pytest.importorskip("transformers")
    from scale_equalization import equalize_

    section = README.read_text().partition("## In the Hugging Face Trainer")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    lines, trainer, _ = found[1].partition("trainer = transformers.Trainer(")
    assert trainer  # building it needs no network of ours: the lines before it are what counts
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, num_labels=3
    )
    images = [{"pixel_values": torch.randn(3, 64, 64)} for _ in range(16)]
    names = {
        "model": transformers.SegformerForSemanticSegmentation(config),
        "train_dataset": images,
        "data_collator": transformers.default_data_collator,
        "DataLoader": DataLoader,
        "equalize_": equalize_,
    }
    exec(lines, names)  # the text is our own
    assert [row["fusion"] for row in names["report"].rows] == ["decode_head.linear_fuse"] * 4
