"""One run of a study, by the same door as `fit`; and the process that does runs as it is asked."""

from __future__ import annotations

import gc
import json
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from seglab.cli.arguments import merge
from seglab.cli.user_errors import explain
from seglab.study.plan import Plan, read_plan
from seglab.study.records import Record, run_folder
from seglab.study.scheduling import as_line

if TYPE_CHECKING:
    from seglab.cli.experiment import Experiment

    Build = Callable[[list[str]], Experiment]

TABLES = ("seglab.reporting.metrics_csv.MetricsTable", "seglab.study.mechanism.MechanismTable")
MONITOR = "scale_equalization.ScaleMonitor"
NO_PICTURES = (
    {"class_path": "seglab.reporting.pictures.PictureGrid", "init_args": {"count": 0}},
    {
        "class_path": "seglab.reporting.evaluation_files.EvaluationFiles",
        "init_args": {"n_extremes": 0},
    },
)


def config_of(plan: Plan, arm: str) -> dict[str, Any]:
    """The sections of an arm: those of the plan, with what the arm overrides."""
    tree: dict[str, Any] = {}
    merge(tree, dict(plan.config))
    merge(tree, dict(plan.arms[arm]))
    return tree


def config_of_run(plan: Plan, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """The sections of a run, with what a study sets: device, folder, loggers, monitor."""
    tree = config_of(plan, arm)
    settings = plan.settings
    n_steps = settings["monitor_every"]
    watched = n_steps != 0 and "scale_equalization" not in (tree.get("without") or [])
    interval = {"every_n_steps": n_steps} if n_steps else {}
    monitor = {"class_path": MONITOR, "init_args": {"missing_ok": True, **interval}}
    loggers = [{"class_path": path, "init_args": {"folder": str(folder)}} for path in TABLES]
    trainer = {
        "accelerator": settings["device"],
        "devices": 1,
        "logger": loggers,
        "enable_progress_bar": False,
        "enable_checkpointing": settings["keep_checkpoints"],
        "default_root_dir": str(folder),
        "callbacks+": [*NO_PICTURES, *([monitor] if watched else [])],
    }
    merge(tree, {"seed_everything": seed, "trainer": trainer})
    return tree


def execute(build: Build, study: Path, plan: Plan, arm: str, seed: int) -> Record:
    """Do one run; whatever is refused or breaks in it is in the record.

    Args:
        build: Makes an experiment from the arguments of `fit`.
        study: Folder of the study.
        plan: Of the study.
        arm: Name.
        seed: Of the run.
    """
    import seglab.cli.experiment  # noqa: F401  # takes seconds, which are no run's

    folder = run_folder(study, arm, seed)
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_of_run(plan, arm, seed, folder), sort_keys=False))
    begun = time.perf_counter()
    known: dict[str, Any] = {}
    try:
        with (folder / "log.txt").open("w") as log, _written_to(log):
            _train(build, plan, path, known)
        error = "" if known["curve"] else "nothing was validated: see the limits of the trainer."
    except Exception as mistake:
        _pass_on_stop(mistake, study)
        (folder / "error.txt").write_text(traceback.format_exc())
        first = str(mistake).strip().splitlines() or [""]
        error = explain(mistake) or f"{type(mistake).__name__}: {first[0]} (see error.txt)"
    seconds = round(time.perf_counter() - begun, 3)
    gc.collect()
    status: Any = "failed" if error else "finished"
    return Record(arm, seed, status, error, seconds, **known)


def _train(build: Build, plan: Plan, path: Path, known: dict[str, Any]) -> None:
    """Train and note in `known` what a record holds, also of a run that breaks."""
    experiment = build(["--config", str(path)])
    import torch

    from seglab.study.recorder import RunRecorder

    n_threads = plan.settings["threads"]
    if n_threads:
        torch.set_num_threads(n_threads)
    recorder = RunRecorder(settle_monitor=plan.settings["monitor_every"] is None)
    callbacks: Any = experiment.trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, recorder)
    known["environment"] = _environment(plan)
    try:
        experiment.trainer.fit(experiment.model, experiment.datamodule)
    finally:
        known["pairing"], known["curve"] = recorder.pairing, tuple(recorder.curve)
        known["per_class"] = recorder.per_class
    if recorder.diverged:
        raise ValueError(
            f"the training diverged: {recorder.diverged} is not finite at its end, so its mIoU says"
            " nothing; lower the learning rate, or set trainer.gradient_clip_val"
        )


def _environment(plan: Plan) -> dict[str, Any]:
    import torch

    from seglab.study.plan import versions

    kind = plan.settings["device"]
    device = torch.cuda.get_device_name() if kind == "cuda" else kind
    return {**versions(), "device": device, "threads": torch.get_num_threads()}


def _pass_on_stop(mistake: Exception, study: Path) -> None:
    """A signal ends the study, not a run of it."""
    from seglab.cli.program import command_line
    from seglab.cli.user_errors import StoppedError
    from seglab.stopping import RunStoppedError

    if isinstance(mistake, RunStoppedError):
        sentence = f"stopped; go on with: {command_line()} study --resume {study}"
        raise StoppedError(sentence, mistake.signum) from None


@contextmanager
def _written_to(log: Any) -> Iterator[None]:
    """What is printed goes to a file."""
    import logging

    handlers = [h for h in logging.getLogger("lightning.pytorch").handlers if hasattr(h, "stream")]
    streams = [handler.stream for handler in handlers]
    with redirect_stdout(log), redirect_stderr(log):
        for handler in handlers:
            handler.stream = log
        try:
            yield
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.stream = stream


def serve(build: Build) -> None:
    """Do the runs that standard input asks for, one JSON line each, and answer with records.

    The process ends as soon as standard input does: whoever asked is gone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    tasks: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    plans: dict[str, Plan] = {}
    while True:
        task: Mapping[str, Any] = json.loads(tasks.get())
        study = Path(task["study"])
        plan = plans[task["study"]] = plans.get(task["study"]) or read_plan(study)
        record = execute(build, study, plan, task["arm"], task["seed"])
        answers.write(as_line(record) + "\n")
        answers.flush()


def _listen(tasks: queue.Queue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(1)
