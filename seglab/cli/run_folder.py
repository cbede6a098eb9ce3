"""Where a run keeps its files: logs/<config name>/<command>_<n>, never shared by two runs."""

import re
from itertools import count
from pathlib import Path

RUN_FOLDER = re.compile(r"(version|validate|test|predict)_\d+")


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


def claim_version(folder: str | Path, kind: str) -> str:
    """Make the first free folder `<kind>_<n>`.

    Making it is the claim: of several runs that start at once, each gets its own.

    Args:
        folder: Made if need be.
        kind: Such as "version".

    Returns:
        The name of the new folder, without `folder`.

    >>> import tempfile
    >>> root = tempfile.mkdtemp()
    >>> claim_version(root, "version"), claim_version(root, "version")
    ('version_0', 'version_1')
    """
    for number in count():
        name = f"{kind}_{number}"
        try:
            Path(folder, name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError("numbers do not end")
