"""`fit --resume RUN_FOLDER`: the same config, the last checkpoint, the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from seglab.checkpoints import read_step
from seglab.cli.run_folder import RunFolderError, require_run
from seglab.lightning_internals import is_first_process


class Continued(NamedTuple):
    """A run that goes on.

    Attributes:
        folder: Where it keeps its files.
        checkpoint: The latest in it.
        step: Optimizer steps that are done there.
    """

    folder: Path
    checkpoint: Path
    step: int


class MovedFolder(Callback):
    """Tells a continued run's checkpoint callbacks where their folder is now.

    Lightning forgets which checkpoint is the best where the folder has another name than before,
    be it only relative to another working directory.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rewrite the paths before the callbacks see them."""
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key, {})
            then, now = state.get("dirpath"), getattr(callback, "dirpath", None)
            if then is not None and now is not None:
                checkpoint["callbacks"][callback.state_key] = _moved(state, str(then), str(now))


def _moved(value: Any, then: str, now: str) -> Any:
    """Copy a state with another folder in every path, keys included."""
    if isinstance(value, dict):
        return {_moved(k, then, now): _moved(v, then, now) for k, v in value.items()}
    if isinstance(value, str) and (value == then or value.startswith(f"{then}/")):
        return now + value[len(then) :]
    return value


def find_run(folder: Path) -> Continued:
    """Look for the latest checkpoint of a run.

    Files that cannot be read are passed over as long as there is another.

    Raises:
        RunFolderError: The folder holds no run.
        ValueError: None of its checkpoints can be read.
    """
    require_run(folder)
    found = {path: _step(path) for path in folder.glob("checkpoints/*.ckpt")}
    faults = [step for step in found.values() if isinstance(step, str)]
    steps = [(s, p.name == "last.ckpt", p) for p, s in found.items() if isinstance(s, int)]
    if not steps:
        raise RunFolderError(f"--resume: {' '.join(faults)}")
    for fault in faults if is_first_process() else []:
        print(f"passed over: {fault}")
    step, _, checkpoint = max(steps)
    return Continued(folder, checkpoint, step)


def _step(path: Path) -> int | str:
    """Steps that a checkpoint holds, or what is wrong with it."""
    try:
        return read_step(path)
    except ValueError as error:
        return str(error)


def resumed_args(args: list[str], run: Continued) -> list[str]:
    """Arguments of `fit` that continue a run; single values of the config may be changed.

    Raises:
        RunFolderError: There is a second config or checkpoint.
    """
    for option in ("--config", "-c", "--ckpt_path", "--trainer.default_root_dir"):
        if any(arg == option or arg.startswith(f"{option}=") for arg in args):
            raise RunFolderError(
                f"--resume brings the run's own config, folder and checkpoint: leave {option} out."
            )
    config = ["--config", str(run.folder / "config.yaml")]
    return [*config, *args, "--ckpt_path", str(run.checkpoint)]
