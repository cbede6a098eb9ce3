"""Every row of the table in docs/own_data.md: the doctor, `init` and a batch say the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from everyday_sets import ALL, NAMES, ROWS, Row, table

from seglab.cli.init import write_config
from seglab.data import FolderDataModule
from seglab.data.inspection.doctor import doctor

Expected = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(params=ROWS, ids=[row.have for row in ROWS])
def row(request: pytest.FixtureRequest) -> Row:
    return request.param  # type: ignore[no-any-return]


def write(row: Row, root: Path, run: Callable[..., None]) -> Expected:
    root.mkdir()
    expected = row.write(root)
    if row.prepare:
        run("prepare", *row.prepare.replace("ROOT", str(root)).split())
    return expected


def module(root: Path, names: list[str], **options: Any) -> FolderDataModule:
    fixed = {"crop_size": None, "num_workers": 0, "batch_size": 2}
    return FolderDataModule(str(root), names, **options | fixed)


def samples(data: FolderDataModule) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image (H, W, C) and mask of every stem, from training batches and validation batches."""
    data.setup("fit")
    found = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for name, image, mask in zip(batch["name"], batch["image"], batch["mask"], strict=True):
                stem = re.search(r"v\d_\d", name)
                assert stem is not None
                found[stem[0]] = image.permute(1, 2, 0).numpy(), mask.numpy()
        for name in ("train_dataset", "val_dataset"):  # an epoch may leave an image to the next one
            dataset = getattr(data, name)
            for index in range(len(dataset)):
                sample = dataset[index]
                stem = re.search(r"v\d_\d", sample["name"])
                assert stem is not None
                found.setdefault(
                    stem[0], (sample["image"].permute(1, 2, 0).numpy(), sample["mask"].numpy())
                )
    return found


def test_typed_lines_give_every_pixel(row: Row, tmp_path: Path, run: Callable[..., None]) -> None:
    expected = write(row, tmp_path / "set", run)
    options = row.options(tmp_path / "set")
    found = samples(module(tmp_path / "set", NAMES[: row.n_classes], **options))
    assert sorted(found) == sorted(ALL)
    for name, (image, mask) in expected.items():
        assert found[name][0].shape == image.shape
        assert found[name][0].dtype == (np.float32 if "value_range" in options else np.uint8)
        np.testing.assert_allclose(
            found[name][0].astype(np.float64), image.astype(np.float64), atol=row.atol
        )
        np.testing.assert_array_equal(found[name][1], mask)
    diagnosis = doctor(module(tmp_path / "set", NAMES[: row.n_classes], **options))
    assert diagnosis.faults == ()
    n_images = sum(split.n_images for split in diagnosis.splits)
    assert n_images == len(ALL)


def test_doctor_says_what_to_type(row: Row, tmp_path: Path, run: Callable[..., None]) -> None:
    write(row, tmp_path / "set", run)
    diagnosis = doctor(module(tmp_path / "set", NAMES[: row.n_classes]))
    if row.doctor:
        assert re.search(row.doctor, "\n".join(diagnosis.faults)), diagnosis.faults
    else:
        assert diagnosis.faults == ()


def test_init_guesses_it(row: Row, tmp_path: Path, run: Callable[..., None]) -> None:
    expected = write(row, tmp_path / "set", run)
    write_config(tmp_path / "set", tmp_path / "mine.yaml")
    options = yaml.safe_load((tmp_path / "mine.yaml").read_text())["data"]["init_args"]
    names = options.pop("class_names")
    options.pop("root")
    assert len(names) == row.n_classes
    data = module(tmp_path / "set", names, **options)
    assert doctor(data).faults == ()
    found = samples(data)
    assert sorted(found) == sorted(ALL)
    pairs = set()
    for name, (image, mask) in expected.items():
        if row.init == "right":
            np.testing.assert_allclose(
                found[name][0].astype(np.float64), image.astype(np.float64), atol=row.atol
            )
        pairs |= {*zip(mask.ravel().tolist(), found[name][1].ravel().tolist(), strict=True)}
    assert len(pairs) == len(dict(pairs)) == len({found for _, found in pairs})  # only renumbered
    assert dict(pairs).get(255, 255) == 255


def test_the_table_is_the_documented_one() -> None:
    documented = (Path(__file__).parents[2] / "docs/own_data.md").read_text()
    assert table() in documented
    assert len(ROWS) >= 25
