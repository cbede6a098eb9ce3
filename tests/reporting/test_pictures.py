"""The grid of a validation: which images, in the folder and in the loggers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seglab.reporting.pictures import PictureGrid, send_picture

PALETTE = [(9, 9, 9), (200, 0, 0)]


class Folder:
    """As much of a trainer as the callback looks at."""

    is_global_zero, sanity_checking, fast_dev_run, global_step = True, False, False, 12

    def __init__(self, log_dir: Path, n_batches: int) -> None:
        self.log_dir, self.loggers = str(log_dir), [object()]
        self.num_val_batches = [n_batches]


def validate(grid: PictureGrid, trainer: Any, n_batches: int, batch_size: int = 2) -> np.ndarray:
    """Batches whose images are grey in the level of their number; every pixel predicted 1."""
    task = SimpleNamespace(palette=PALETTE, num_classes=2, class_names=("a", "b"))
    for index in range(n_batches):
        first = index * batch_size
        levels = torch.arange(first, first + batch_size, dtype=torch.uint8)
        image = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        mask = torch.zeros(batch_size, 4, 4, dtype=torch.uint8)
        outputs = {"prediction": torch.ones(batch_size, 4, 4, dtype=torch.uint8)}
        batch = {"image": image, "mask": mask, "name": [f"n{first}", f"n{first + 1}"][:batch_size]}
        grid.on_validation_batch_end(trainer, task, outputs, batch, index)
    grid.on_validation_epoch_end(trainer, task)
    return np.asarray(Image.open(Path(trainer.log_dir, "pictures", "step_0000012.png")))


@pytest.mark.parametrize("n_batches", [3, 9, 30])
def test_rows_are_spread_over_the_set(tmp_path: Path, n_batches: int) -> None:
    picture = validate(PictureGrid(count=3, side=80), Folder(tmp_path, n_batches), n_batches)
    grey = picture[:, 0, 0]
    cells = [int(level) for level in grey if level < 2 * n_batches]
    shown = sorted(set(cells))
    assert [level * 3 // (2 * n_batches) for level in shown] == [0, 1, 2]
    assert all(cells.count(level) == 80 for level in shown)
    row = picture[cells.index(shown[0]) + 60]
    assert row[120].tolist() == list(PALETTE[0])
    assert row[210].tolist() == list(PALETTE[1])


def test_second_validation_shows_the_same_images(tmp_path: Path) -> None:
    grid, trainer = PictureGrid(count=3, side=4), Folder(tmp_path, 3)
    np.testing.assert_array_equal(validate(grid, trainer, 3), validate(grid, trainer, 3))


def test_no_picture_is_asked_for_by_count_zero(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step_"):
        validate(PictureGrid(count=0), Folder(tmp_path, 2), 2)


def test_tensorboard_shows_the_grid(fitted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fitted))
    events.Reload()
    assert [event.step for event in events.Images("pictures")] == [2, 4]
    assert "val/mIoU" in events.Tags()["scalars"]


class Recorder:
    """Stands for the object behind a logger; notes how it is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))


@pytest.mark.parametrize(
    ("kind", "called", "options"),
    [
        ("TensorBoardLogger", "add_image", {"dataformats": "HWC"}),
        ("MLFlowLogger", "log_image", {"artifact_file": "pictures/step_0000012.png"}),
        ("CometLogger", "log_image", {"name": "pictures", "step": 12}),
    ],
)
def test_every_logger_is_sent_the_picture(kind: str, called: str, options: dict[str, Any]) -> None:
    from lightning.pytorch import loggers

    recorder, base = Recorder(), getattr(loggers, kind)
    fake = type(
        kind,
        (base,),
        {"__init__": lambda self: None, "experiment": property(lambda self: recorder)},
    )
    fake.run_id = "run"
    picture = np.zeros((4, 4, 3), np.uint8)
    send_picture(fake(), picture, 12)
    ((name, args, found),) = recorder.calls
    assert (name, found) == (called, options)
    assert any(argument is picture for argument in args)


def test_wandb_is_sent_a_list_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from lightning.pytorch.loggers import WandbLogger

    logged: list[tuple[Any, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda array: ("image", array)))
    methods = {"__init__": lambda self: None}
    methods["log_metrics"] = lambda self, metrics, step: logged.append((metrics, step))
    picture = np.zeros((4, 4, 3), np.uint8)
    send_picture(type("Fake", (WandbLogger,), methods)(), picture, 12)
    assert logged == [({"pictures": [("image", picture)]}, 12)]


def test_other_logger_with_log_image_is_sent_the_picture() -> None:
    recorder, picture = Recorder(), np.zeros((4, 4, 3), np.uint8)
    send_picture(recorder, picture, 12, name="charts/scales")
    assert recorder.calls == [("log_image", ("charts/scales", [picture], 12), {})]
    send_picture(object(), picture, 12)
