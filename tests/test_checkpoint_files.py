"""A checkpoint is whole or is not there; what cannot be read is said in one sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from seglab.checkpoint_files import CheckpointFileError, WholeFiles, write_checkpoint
from seglab.checkpoints import read_checkpoint, read_step, require_resumable

CONTENT = {"state_dict": {"weight": torch.arange(50_000)}, "global_step": 7, "loops": {}}


class Full:
    """A disk that takes so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
        real_open = Path.open

        def open_(path: Path, mode: str = "r", *args: Any) -> Any:
            file = real_open(path, mode, *args)
            if "w" not in mode:
                return file
            left, write = [n_bytes], file.write

            class Short:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    file.close()

                def write(self, data: bytes) -> int:
                    left[0] -= len(data)
                    if left[0] < 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return write(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

            return Short()

        monkeypatch.setattr(Path, "open", open_)


@pytest.mark.parametrize("n_bytes", [0, 100, 200_000, 400_000])
def test_full_disk_keeps_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({**CONTENT, "global_step": 6}, path)
    with monkeypatch.context() as patched:
        Full(patched, n_bytes)
        match = r"last\.ckpt could not be written \(No space left on device\); the one before it is"
        with pytest.raises(CheckpointFileError, match=match):
            write_checkpoint(CONTENT, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_step(path) == 6


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointFileError, match="Permission denied"):
        write_checkpoint(CONTENT, tmp_path / "last.ckpt")
    tmp_path.chmod(0o700)


def test_file_is_complete_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flushed"), fsync(fd)))

    def spy(path: Path, target: Path) -> Path:
        assert read_step(path) == 7
        events.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", spy)
    write_checkpoint(CONTENT, tmp_path / "new" / "last.ckpt")
    assert events == ["flushed", "renamed", "flushed"]


def test_leftover_of_a_crash_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt.partial").write_bytes(b"half")
    WholeFiles().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    loaded = WholeFiles().load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded["state_dict"]["weight"], CONTENT["state_dict"]["weight"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
@pytest.mark.parametrize("read", [read_checkpoint, read_step, WholeFiles().load_checkpoint])
def test_file_cut_short_is_said_so(tmp_path: Path, share: float, read: Any) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(CONTENT, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read: it is (cut|empty)"):
        read(path)


class Custom:
    """What must not be unpickled."""


def test_foreign_files_are_said_so(tmp_path: Path) -> None:
    path = tmp_path / "photo.ckpt"
    for content in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"photo\.ckpt cannot be read, so it is no checkpoint"):
            read_checkpoint(path)
    torch.save({"model": Custom()}, path)
    with pytest.raises(ValueError, match=r"not one to be trusted: .*Weights only load failed"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(path)


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"not written by a training run .*--model\.weights"):
        require_resumable(tmp_path / "weights.pt", is_training=True)
    with pytest.raises(ValueError, match="was not written by a training run"):
        read_step(tmp_path / "weights.pt")
