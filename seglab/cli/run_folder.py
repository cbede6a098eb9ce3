"""Where a run keeps its files: logs/<config name>/<command>_<n>, never shared by two runs."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from itertools import count
from pathlib import Path

RUN_FOLDER = re.compile(r"(version|validate|test|predict)_\d+")

WRITTEN_BEFORE_TRAINING = re.compile(
    r"(config|hparams)\.yaml|events\.out\.tfevents.*|scale_equalization\.(json|csv)|scales\.png"
)
"""What a run folder holds when nothing has been trained or evaluated yet."""


class RunFolder:
    """A folder that this process alone writes to, until `release`.

    Args:
        path: The folder; it is there.
        made: Folders that were made for it, itself last; none for a run that is continued.

    Raises:
        RunFolderError: Another process is writing to it.
    """

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path = path
        self._made = made
        self._before = set(path.rglob("*"))
        self._lock: int | None = _lock(path)

    def release(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            _HELD.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def discard_if_nothing_happened(self) -> None:
        """Take back a new folder in which there is nothing that cannot be had again.

        Of a folder that was there before, what was added to it.
        """
        files = [p for p in self.path.rglob("*") if p.is_file() and p not in self._before]
        if not all(WRITTEN_BEFORE_TRAINING.fullmatch(p.name) for p in files):
            return
        for file in files:
            file.unlink()
        new = (p for p in self.path.rglob("*") if p.is_dir() and p not in self._before)
        inside = sorted(new, reverse=True)
        with suppress(OSError):  # another run has moved in
            for folder in [*inside, *reversed(self._made)]:
                folder.rmdir()


class RunFolderError(Exception):
    """A folder that is no run's, or that another process is writing to."""


def experiment_name(path: str | None) -> str:
    """Name an experiment after its config, or after the run that a file belongs to.

    Below a folder `configs` the path counts, elsewhere the file's name; the `config.yaml` and the
    checkpoints in a run's folder stand for that run's experiment.

    Args:
        path: A config or checkpoint; None names nothing.

    >>> experiment_name("configs/camvid/upernet_resnet18.yaml"), experiment_name("my/try.yaml")
    ('camvid/upernet_resnet18', 'try')
    >>> experiment_name("logs/camvid/try/version_0/config.yaml"), experiment_name(None)
    ('camvid/try', 'default')
    """
    if path is None:
        return "default"
    folders = Path(path).parts[:-1]
    if "configs" in folders:
        return "/".join([*folders[_last(folders, "configs") + 1 :], Path(path).stem])
    runs = [index for index, name in enumerate(folders) if RUN_FOLDER.fullmatch(name)]
    if runs:
        start = _last(folders, "logs") + 1 if "logs" in folders else runs[-1] - 1
        return "/".join(folders[start : runs[-1]]) or "default"
    return Path(path).stem


def _last(folders: tuple[str, ...], name: str) -> int:
    return len(folders) - 1 - folders[::-1].index(name)


def claim_folder(folder: str | Path, kind: str) -> RunFolder:
    """Make the first free folder `<kind>_<n>`.

    Making it is the claim: of several runs that start at once, each gets its own.

    Args:
        folder: Made if need be.
        kind: Such as "version".

    >>> import tempfile
    >>> root = tempfile.mkdtemp()
    >>> claim_folder(root, "version").path.name, claim_folder(root, "version").path.name
    ('version_0', 'version_1')
    """
    folder = Path(folder)
    made = [path for path in [*reversed(folder.parents), folder] if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for number in count():
        path = folder / f"{kind}_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return RunFolder(path, [*made, path])
    raise AssertionError("numbers do not end")


def require_run(folder: Path) -> None:
    """See that a folder holds a run that can be continued; torch is not asked.

    Raises:
        RunFolderError: It does not.
    """
    if folder.is_file():
        raise RunFolderError(
            f"--resume takes the folder of a run, {folder} is a file: a checkpoint of its own goes "
            "to --ckpt_path, in a new folder."
        )
    if not folder.is_dir():
        raise RunFolderError(f"--resume: there is no folder {folder}: check the path.")
    if not (folder / "config.yaml").is_file() or not list(folder.glob("checkpoints/*.ckpt")):
        runs = sorted(str(path.parent) for path in folder.glob("**/version_*/checkpoints"))
        hint = f"; runs in it: {', '.join(runs[-3:])}" if runs else ""
        raise RunFolderError(
            f"--resume: {folder} has no config.yaml and checkpoints/*.ckpt to continue from{hint}."
        )


def _lock(folder: Path) -> int | None:
    """Lock a folder for this process, where the system can; the lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunFolderError(
            f"{folder} is being written to by another process: wait for it, or start a new run."
        ) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    _HELD.add(descriptor)
    return descriptor


_HELD: set[int] = set()
"""Locks of this process. Its forks, the workers that load data, would hold on to them."""


def _let_go() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
