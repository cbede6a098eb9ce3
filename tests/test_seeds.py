"""One seed reaches everything that is drawn; runs of one seed are paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from step_runs import Diary, NoiseData, make_task, make_trainer

from seglab.cli import build_experiment
from seglab.data import ScenesDataModule
from seglab.seeds import VARIABLE


@pytest.fixture(autouse=True)
def forget_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")  # put back afterwards, whatever a test leaves there


def first_batch(**options: Any) -> tuple[torch.Tensor, list[str]]:
    """Images and their names, cropped, flipped and coloured by the standard recipe."""
    data = ScenesDataModule(
        size=32, train_length=40, batch_size=4, num_workers=0, crop_size=(16, 16), **options
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return batch["image"], batch["name"]


def test_five_seeds_have_five_first_batches() -> None:
    images, names = [], []
    for seed in range(5):
        seed_everything(seed)
        image, order = first_batch()
        images.append(image)
        names.append(tuple(order))
    assert len(set(names)) == 5
    assert len({image.numpy().tobytes() for image in images}) == 5


def test_seed_of_the_data_wins_over_the_run() -> None:
    seed_everything(3)
    assert torch.equal(first_batch(seed=1)[0], first_batch(seed=1)[0])
    assert not torch.equal(first_batch(seed=1)[0], first_batch()[0])
    seed_everything(1)
    assert torch.equal(first_batch(seed=1)[0], first_batch()[0])


def test_validation_scenes_are_the_same_for_every_seed() -> None:
    found = []
    for seed in (0, 4):
        data = ScenesDataModule(size=32, val_length=2, num_workers=0, seed=seed)
        data.setup("validate")
        found.append(data.val_dataset[1]["image"])
    assert torch.equal(*found)


class Seen(Diary):
    """The images of every step, and what dropout left of the first output."""

    def on_before_zero_grad(self, *_: Any) -> None:
        self.draw = torch.rand(1).item()


def test_other_seed_is_said_and_draws_another_dropout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for seed in (0, 1):
        seed_everything(seed)
        seen = Seen()
        with caplog.at_level("INFO"):
            make_trainer(tmp_path, seen, max_steps=1).fit(make_task(), NoiseData(seed=0))
        runs.append(seen)
    assert runs[0].images == runs[1].images
    assert runs[0].draw != runs[1].draw
    said = "seed_everything is 1 (initial weights, dropout, calibration), data.seed is 0"
    assert said in caplog.text


def build(tiny: Path, *options: object) -> Any:
    arguments = ["--config", tiny, "--trainer.logger", "false", *options]
    return build_experiment([str(argument) for argument in arguments])


def state(experiment: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.model.network.parameters()])


def test_command_line_seed_reaches_data_and_weights(tiny: Path) -> None:
    one, other = build(tiny, "--seed_everything", 1), build(tiny, "--seed_everything", 2)
    assert (one.datamodule.seed, other.datamodule.seed) == (1, 2)
    assert not torch.equal(state(one), state(other))
    own = build(tiny, "--seed_everything", 1, "--data.seed", 7)
    assert own.datamodule.seed == 7
    assert torch.equal(state(own), state(one))


def test_control_run_is_paired_with_its_seed(tiny: Path) -> None:
    found = []
    for mode in ("fold", "off"):
        run = build(tiny, "--seed_everything", 5, "--scale_equalization.mode", mode)
        run.datamodule.setup("fit")
        batch = next(iter(run.datamodule.train_dataloader()))
        found.append((state(run), batch["image"], batch["name"]))
    (weights, images, names), (control_weights, control_images, control_names) = found
    assert names == control_names
    assert torch.equal(images, control_images)
    assert torch.equal(weights, control_weights)
