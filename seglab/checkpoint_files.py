"""Write checkpoints so that a file is whole or is not there: temporary name, flush, rename.

Lightning's own writer collects the file in memory and moves it from the system's temporary folder,
which between two disks is a copy that can be cut short.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from seglab.checkpoints import read_checkpoint


class CheckpointFileError(OSError):
    """The disk is full or cannot be written; what was there before still is."""


class WholeFiles(TorchCheckpointIO):
    """Lightning's door to checkpoint files, for the local disk; the default of every command."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; addresses such as s3:// go to Lightning's writer."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; one sentence for a file that is cut short or another program's."""
        if "://" in str(path) or weights_only is False:
            content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
            return content
        return read_checkpoint(path)


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint beside `path` and rename it when the disk has all of it.

    Args:
        content: What `torch.save` takes.
        path: The file, replaced if it is there; its folder is made if need be.

    Raises:
        CheckpointFileError: With nothing changed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")  # one name: the next try overwrites it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            _save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = "; the one before it is still there" if path.exists() else ""
        raise CheckpointFileError(
            f"{path} could not be written ({error.strerror or error}){kept}: free some space or "
            "make the folder writable."
        ) from error


class _Remembering:
    """A file that remembers why it could not be written: torch reports something else."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    remembering: Any = _Remembering(file)
    try:
        torch.save(content, remembering)
    except Exception as error:
        if remembering.error is None:
            raise
        raise remembering.error from error


def _flush_folder(folder: Path) -> None:
    """Let the new name survive a power failure too, where folders can be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
