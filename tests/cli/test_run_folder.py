"""Run folders: continued in place, never shared in silence, never left empty."""

from __future__ import annotations

import io
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

from seglab.cli.run_folder import RunFolder, RunFolderError, claim_folder, require_run

Run = Callable[..., None]
Complaint = Callable[..., tuple[int, str]]


@pytest.fixture
def complaint(run: Run, capsys: pytest.CaptureFixture) -> Complaint:
    """Run a command line that must fail; returns exit code and the last line of stderr."""

    def complaint(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit, match=r"\d") as caught:
            run(*args)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return int(caught.value.code), err.rstrip().splitlines()[-1]

    return complaint


def test_two_writers_never_share_a_folder(tmp_path: Path) -> None:
    first = claim_folder(tmp_path, "version")
    with pytest.raises(RunFolderError, match="is being written to by another process"):
        RunFolder(first.path, made=[])
    first.release()
    RunFolder(first.path, made=[]).release()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_do_not_hold_on_to_a_folder(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    folder, ready, enough = claim_folder(tmp_path, "version"), fork.Event(), fork.Event()

    def outlive_the_trainer() -> None:
        ready.set()
        enough.wait(30)

    worker = fork.Process(target=outlive_the_trainer, daemon=True)
    worker.start()
    assert ready.wait(30)
    folder.release()
    RunFolder(folder.path, made=[]).release()
    enough.set()
    worker.join(30)


def test_discarding_keeps_what_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    folder = claim_folder(tmp_path / "mine/new/deeper", "version")
    (folder.path / "config.yaml").write_text("a: 1")
    folder.discard_if_nothing_happened()
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_results_of_any_kind_are_not_discarded(tmp_path: Path) -> None:
    for name in ("metrics.csv", "checkpoints/last.ckpt", "masks/a.png"):
        folder = claim_folder(tmp_path, "version")
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text("")
        folder.discard_if_nothing_happened()
        assert (folder.path / name).exists()


@pytest.mark.parametrize(
    "args",
    [
        ("--data.batch_size", "0"),
        ("--model.total_batch", "7"),
        ("--trainer.devices", "[3, 9]"),
        ("--model.weights", "none.ckpt"),
        ("--trainer.val_check_interval", "99"),
    ],
)
def test_wrong_input_leaves_no_folder(
    complaint: Complaint, tiny: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    root = tmp_path / "logs"
    complaint("fit", "--config", tiny, "--trainer.default_root_dir", root, *args)
    assert not root.exists()


@pytest.fixture
def copied(fitted: Path, tmp_path: Path) -> Path:
    """A finished run in a place of its own."""
    return Path(shutil.copytree(fitted, tmp_path / "moved" / "version_0"))


def test_finished_run_can_be_extended_after_a_move(
    run: Run, copied: Path, logged: Callable[[Path, str], list[float]]
) -> None:
    before = (copied / "metrics.csv").read_text()
    longer = ("--trainer.max_epochs", "3", "--model.scheduler.total_steps", "4")
    with redirect_stdout(io.StringIO()) as said:
        run("fit", "--resume", copied, *longer)
    assert "nothing was left to train" not in said.getvalue()
    assert (copied / "metrics.csv").read_text().startswith(before)
    assert len(logged(copied, "train/loss")) == 6
    last = torch.load(copied / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert [path.name for path in copied.parent.iterdir()] == ["version_0"]
    saved = yaml.safe_load((copied / "config.yaml").read_text())
    assert (saved["ckpt_path"], saved["trainer"]["max_epochs"]) == (None, 3)
    for callback in last["callbacks"].values():
        if "best_model_path" in callback:
            assert callback["best_model_path"].startswith(str(copied))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_refused_resume_changes_nothing_in_the_folder(
    complaint: Complaint, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's handler may hold the stream that pytest closed after an earlier test.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    before = contents(copied)
    complaint("fit", "--resume", copied, "--trainer.max_epochs", "3")  # and the schedule ends at 2
    assert contents(copied) == before


def test_finished_run_says_that_nothing_was_left(
    run: Run, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "--resume", copied)
    assert "nothing was left to train: " in capsys.readouterr().out


def test_best_so_far_counts_after_a_move(run: Run, copied: Path) -> None:
    path = copied / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    for state in content["callbacks"].values():
        if state.get("monitor") == "val/mIoU":
            state["best_model_score"] = state["current_score"] = torch.tensor(0.99)
            state["best_k_models"] = {key: torch.tensor(0.99) for key in state["best_k_models"]}
            state["kth_value"] = torch.tensor(0.99)
    torch.save(content, path)
    best = (copied / "checkpoints/best.ckpt").read_bytes()
    longer = ("--trainer.max_epochs", "3", "--model.scheduler.total_steps", "4")
    run("fit", "--resume", copied, *longer)
    assert (copied / "checkpoints/best.ckpt").read_bytes() == best


def test_unreadable_checkpoint_is_passed_over(
    run: Run, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    (copied / "checkpoints/last.ckpt").write_bytes(b"PK\x03\x04 half")
    run("fit", "--resume", copied)
    out = capsys.readouterr().out
    assert "passed over: checkpoint" in out
    assert torch.load(copied / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_sharded_checkpoint_is_sent_elsewhere(complaint: Complaint, copied: Path) -> None:
    for file in (copied / "checkpoints").iterdir():
        file.unlink()
    (copied / "checkpoints/last.ckpt").mkdir()
    assert "is a folder, written by a strategy" in complaint("fit", "--resume", copied)[1]


def test_wrong_resume_is_explained(complaint: Complaint, copied: Path, tmp_path: Path) -> None:
    said = complaint("fit", "--resume", tmp_path / "none")[1]
    assert "there is no folder" in said
    said = complaint("fit", "--resume", copied / "checkpoints/last.ckpt")[1]
    assert "is a file: a checkpoint of its own goes to --ckpt_path" in said
    said = complaint("fit", "--resume", copied.parent)[1]
    assert f"runs in it: {copied}" in said
    said = complaint("fit", "--resume", copied, "--config", "quickstart")[1]
    assert "leave --config out" in said
    lock = RunFolder(copied, made=[])
    assert "is being written to by another process" in complaint("fit", "--resume", copied)[1]
    lock.release()
    with pytest.raises(RunFolderError, match=r"has no config\.yaml and checkpoints"):
        require_run(tmp_path)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_broken_checkpoint_is_one_sentence_everywhere(
    complaint: Complaint, tiny: Path, copied: Path, tmp_path: Path, command: str
) -> None:
    broken, root = copied / "checkpoints/last.ckpt", tmp_path / "logs"
    broken.write_bytes(broken.read_bytes()[:-1000])
    args = ("--config", tiny, "--trainer.default_root_dir", root, "--ckpt_path", broken)
    assert "cannot be read: it is cut short" in complaint(command, *args)[1]
    torch.save({"model": torch.ones(3)}, broken)
    code, said = complaint(command, *args)
    assert (code, "was not written by a training run" in said) == (1, True)
    assert not root.exists()


@pytest.mark.parametrize("command", ["fit", "equalize", "summary"])
def test_broken_weights_are_one_sentence(
    complaint: Complaint, tiny: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "w.ckpt").write_bytes(b"PK\x03\x04 half")
    args = ("--config", tiny, "--model.weights", tmp_path / "w.ckpt")
    if command == "fit":
        args += ("--trainer.default_root_dir", tmp_path / "logs")
    if command == "summary":
        return  # it builds the network and loads nothing
    assert "w.ckpt cannot be read: it is cut short" in complaint(command, *args)[1]
    assert not (tmp_path / "logs").exists()


def test_full_disk_ends_a_run_in_one_sentence(
    complaint: Complaint, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from seglab import checkpoint_files

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "_save", full)
    code, said = complaint("fit", "--config", tiny, "--trainer.default_root_dir", tmp_path)
    assert code == 1
    assert "best.ckpt could not be written (No space left on device)" in said
