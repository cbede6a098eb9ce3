"""Runs of a study: paired by what they really had, remembered, and the same as `fit`."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import study_differences

from seglab.study.plan import read_plan
from seglab.study.records import Record, read_record, read_records, run_folder

# Without equalization, which takes most of the time of such a short run.
PLAIN = ("--without", "[scale_equalization]", "--trainer.max_epochs", 1, "--workers", 0)


def planted(name: str) -> dict:
    return {"trainer": {"callbacks+": [{"class_path": f"study_differences.{name}"}]}}


def records(folder: Path) -> dict[tuple[str, int], Record]:
    return {(record.arm, record.seed): record for record in read_records(folder)}


def test_runs_leave_curve_classes_counts_and_config(study, arms, logged, capsys) -> None:
    folder = study("--arms", arms(), "--seeds", 1, *PLAIN, "--trainer.max_epochs", 2)
    found = records(folder)
    assert set(found) == {("slow", 0), ("fast", 0)}
    record, run = found["fast", 0], run_folder(folder, "fast", 0)
    assert record.status == "finished"
    assert [step for step, _ in record.curve] == [2, 4]
    assert [value for _, value in record.curve] == pytest.approx(logged(run, "val/mIoU"))
    with np.load(run / "counts.npz") as stored:
        names, counts = stored["names"], stored["counts"]
    assert len(set(names)) == 5
    assert counts.shape == (5, 3, 8)
    assert counts.dtype == np.int64
    hits, labelled, predicted = counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou = hits / (labelled + predicted - hits)
    assert list(record.per_class.values()) == [None if v != v else pytest.approx(v) for v in iou]
    assert record.final == pytest.approx(np.nanmean(iou))
    assert (run / "config.yaml").is_file()
    assert not (run / "checkpoints").exists()
    out = capsys.readouterr().out
    assert "[1/2]" in out
    assert "1 left, about" in out
    assert "2 of 2 runs finished" in out
    assert f"{folder / 'study.html'}" in out  # it ends with the analysis
    assert (folder / "study.json").is_file()
    assert "val after" not in out  # that is in the run's log.txt


def test_arms_of_a_seed_are_paired_and_seeds_are_not(study, arms) -> None:
    found = records(study("--arms", arms(), "--seeds", 2, *PLAIN))
    pairings = {run: tuple(record.pairing.values()) for run, record in found.items()}
    assert pairings["slow", 0] == pairings["fast", 0]
    assert pairings["slow", 1] == pairings["fast", 1]
    shared = set(pairings["fast", 0]) & set(pairings["fast", 1])
    assert shared == {found["fast", 0].pairing["validation labels"]}
    assert found["slow", 0].curve != found["fast", 0].curve


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("OtherWeights", "the initial weights are not those of arm"),
        ("OtherOrder", "the training data are not those of arm"),
        ("OtherLabel", "the training data are not those of arm"),
        ("OtherValidation", "the validation labels are not those of arm"),
    ],
)
def test_planted_difference_fails_the_run(study, arms, capsys, name: str, what: str) -> None:
    path = arms(plain={}, planted=planted(name))
    with pytest.raises(SystemExit, match="1"):
        study("--arms", path, "--seeds", 1, *PLAIN)
    (failed,) = (r for r in read_records(Path(path.parent, "study")) if r.status == "failed")
    assert what in failed.error
    assert len(failed.curve) == 1
    out = capsys.readouterr().out
    assert f"failed: {what}" in out
    assert "1 of 2 runs finished" in out


def test_arms_with_other_data_are_not_compared_by_them(study, arms) -> None:
    found = records(study("--arms", arms(a={}, b={"data": {"seed": 5}}), "--seeds", 1, *PLAIN))
    assert {record.status for record in found.values()} == {"finished"}
    n_different = {
        what: len({r.pairing[what] for r in found.values()}) for what in found["a", 0].pairing
    }
    assert n_different == {"initial weights": 1, "training data": 2, "validation labels": 1}


def test_arms_must_be_validated_on_the_same_images(study, arms, tmp_path) -> None:
    """Fewer images than the others', which no digest of the training shows."""
    path = arms(all={}, some={"trainer": {"limit_val_batches": 1}})
    with pytest.raises(SystemExit, match="1"):
        study("--arms", path, "--seeds", 1, *PLAIN)
    (failed,) = (r for r in read_records(tmp_path / "study") if r.status == "failed")
    assert "the validation labels are not those of arm" in failed.error


def test_batches_of_another_size_show_the_same_images(study, arms) -> None:
    path = arms(four={}, two={"data": {"init_args": {"eval_batch_size": 2}}})
    assert {r.status for r in records(study("--arms", path, "--seeds", 1, *PLAIN)).values()} == {
        "finished"
    }


def test_run_that_diverged_has_failed(study, arms, tmp_path) -> None:
    path = arms(calm={}, wild={"model": {"optimizer": {"init_args": {"lr": 1e30}}}})
    with pytest.raises(SystemExit, match="1"):
        study("--arms", path, "--seeds", 1, *PLAIN)
    found = records(tmp_path / "study")
    assert found["calm", 0].status == "finished"
    assert "the training diverged: " in found["wild", 0].error
    assert found["wild", 0].final == found["wild", 0].final  # NaN has an argmax, and that an mIoU
    results = run_folder(tmp_path / "study", "wild", 0) / "results.md"
    assert "val/loss nan" in results.read_text()


def test_failed_run_is_shown_and_repeated_when_asked(
    study, resume, arms, capsys, monkeypatch, tmp_path
) -> None:
    path, folder = arms(fine={}, broken=planted("Breaks")), tmp_path / "study"
    with pytest.raises(SystemExit, match="1"):
        study("--arms", path, "--seeds", 1, *PLAIN)
    broken = run_folder(folder, "broken", 0)
    assert read_record(broken).error == "ValueError: out of luck (see error.txt)"
    assert "in on_train_start" in (broken / "error.txt").read_text()
    assert "broken seed 0: failed: ValueError: out of luck" in capsys.readouterr().out
    monkeypatch.setattr(study_differences.Breaks, "broken", False)
    with pytest.raises(SystemExit, match="1"):
        resume(folder, "--workers", 0)
    assert "1 failed before and are left" in capsys.readouterr().out
    finished = run_folder(folder, "fine", 0) / "run.json"
    before = finished.stat().st_mtime_ns
    resume(folder, "--workers", 0, "--retry_failed")
    assert read_record(broken).status == "finished"
    assert not (broken / "error.txt").exists()
    assert finished.stat().st_mtime_ns == before


def test_what_another_package_refuses_is_one_sentence(study, tmp_path) -> None:
    args = ("--arms", "off", "--seeds", 1, "--workers", 0, "--trainer.precision", "16-true")
    with pytest.raises(SystemExit, match="1"):
        study(*args, "--model.optimizer", "SGD", "--model.optimizer.nesterov", "true")
    (record,) = read_records(tmp_path / "study")
    assert "Nesterov momentum requires a momentum" in record.error
    assert "\n" not in record.error


def test_more_seeds_run_only_the_new_ones(study, resume, arms) -> None:
    folder = study("--arms", arms(), "--seeds", 1, *PLAIN)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}
    resume(folder, "--add_seeds", 1, "--workers", 0)
    assert len(records(folder)) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_run_equals_fit_to_the_last_bit(study, tiny: Path, fit, logged) -> None:
    folder = study("--arms", "fold", "--seeds", 1, "--workers", 0, "--keep_checkpoints")
    plain = fit("--seed_everything", 0)
    ours = run_folder(folder, "fold", 0)
    for key in ("val/mIoU", "val/loss", "train/loss"):
        assert logged(ours, key) == logged(plain, key)
    import torch

    states = [
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for path in (ours, plain)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_mechanism_is_told_for_every_branch(study) -> None:
    folder = study("--arms", "fold", "--seeds", 1, "--workers", 0, "--monitor_every", 3)
    with (run_folder(folder, "fold", 0) / "mechanism.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["step"]) for row in rows} == {0, 3}
    at_start = [row for row in rows if row["step"] == "0"]
    assert len(at_start) == 9  # five branches of the pyramid pooling, four levels
    assert all(float(row[key]) > 0 for row in at_start for key in ("std", "share", "gradient"))
    assert all(float(row["update"]) > 0 for row in at_start)


@pytest.mark.slow
def test_run_is_the_same_after_others_and_alone(study, resume, tmp_path: Path) -> None:
    """In this process after another run, and as the first run of a process of its own."""
    here, there = study("--arms", "off", "reparametrize", "--seeds", 1, "--workers", 0), tmp_path
    arm, seed = read_plan(here).runs[-1]
    shutil.copytree(here, there / "again")
    shutil.rmtree(run_folder(there / "again", arm, seed))
    resume(there / "again", "--workers", 1)
    folders = [run_folder(folder, arm, seed) for folder in (here, there / "again")]
    first, second = map(read_record, folders)
    assert first.curve == second.curve
    assert (first.per_class, first.pairing) == (second.per_class, second.pairing)
    assert first.environment == second.environment
    for name in ("metrics.csv", "mechanism.csv", "scale_equalization.csv", "counts.npz"):
        assert folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes()
