"""metrics.csv: a row per step, useful columns first, and one file however often a run goes on."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from seglab.reporting.metrics_csv import MetricsTable


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def log(logger: MetricsTable, steps: range) -> None:
    for step in steps:
        logger.log_metrics({"lr-SGD": 0.1}, step)
        losses = {"train/loss_decode": torch.tensor(2.0 * step), "train/loss": 1.0 * step}
        logger.log_metrics({"epoch": step // 2, **losses}, step)
        if step % 2:
            figures = {"val/IoU/road": 0.5, "val/mIoU": 0.25, "val/loss": 3.0}
            logger.log_metrics({"epoch": step // 2, **figures}, step)


def test_useful_columns_come_first(tmp_path: Path) -> None:
    logger = MetricsTable(tmp_path)
    logger.log_metrics({"scale_equalization/head/0/std": 0.5}, 0)
    log(logger, range(4))
    logger.finalize("success")
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,lr,train/loss,val/mIoU,val/loss,train/loss_decode,val/IoU/road"
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["0", "1", "2", "3"]
    assert rows(tmp_path / "metrics.csv")[3]["train/loss_decode"] == "6.0"
    assert rows(tmp_path / "scale_equalization.csv") == [
        {"step": "0", "scale_equalization/head/0/std": "0.5"}
    ]


def test_rates_of_groups_follow_the_first(tmp_path: Path) -> None:
    logger = MetricsTable(tmp_path)
    logger.log_metrics({"val/IoU/a": 0.1, "lr-AdamW/pg1": 0.1, "lr-AdamW/pg2": 0.2, "new": 1}, 0)
    logger.save()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,lr/pg1,new,lr/pg2,val/IoU/a"


def test_continued_run_appends_from_its_step(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    log(logger := MetricsTable(whole), range(6))
    logger.finalize("success")
    log(crashed := MetricsTable(part), range(4))  # the checkpoint was that of step 2
    crashed.save()
    log(again := MetricsTable(part, n_steps=2), range(2, 6))
    again.finalize("success")
    assert (part / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_rows_are_on_disk_when_the_next_step_begins(tmp_path: Path) -> None:
    logger = MetricsTable(tmp_path)
    log(logger, range(3))
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["0", "1"]
    logger.save()
    logger.log_metrics({"val/mIoU": 0.5}, 2)  # late, in a row that is written already
    logger.save()
    assert rows(tmp_path / "metrics.csv")[2]["val/mIoU"] == "0.5"


def test_new_column_keeps_the_rows_before(tmp_path: Path) -> None:
    logger = MetricsTable(tmp_path)
    log(logger, range(2))
    logger.log_metrics({"extra": 1.0}, 2)
    logger.save()
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["0", "1", "2"]
