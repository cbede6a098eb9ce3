"""Runs of a study, one after another on every worker at hand, each remembered once it has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seglab.study.arms import StudyError
from seglab.study.ending import end_run, ended_runs
from seglab.study.plan import Plan
from seglab.study.records import Record, parse_record

TOLD_TO_STOP = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a worker that a person or a cluster has stopped: its run has not failed."""

Execute = Callable[[Path, Plan, str, int], Record]
"""Does one run: folder of the study, plan, arm, seed."""


@dataclass
class Schedule:
    """What is left to do, and what has come of it.

    Args:
        study: Folder of the study.
        plan: Of the study.
        retry_failed: Do failed runs again.
        say: Takes a line of progress.
    """

    study: Path
    plan: Plan
    retry_failed: bool = False
    say: Callable[[str], Any] = print
    todo: list[tuple[str, int]] = field(default_factory=list)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    n_workers: int = 1

    def __post_init__(self) -> None:
        ended = ended_runs(self.study, self.plan.runs)
        for run in self.plan.runs:
            if run not in ended or (self.retry_failed and ended[run].status == "failed"):
                self.todo.append(run)
            elif ended[run].status == "failed":
                self.failed[run] = ended[run].error
        self._lock = threading.Lock()
        self._n_begun, self._n_now, self._seconds = 0, 0, 0.0
        self._n_before = len(self.plan.runs) - len(self.todo)

    def next_run(self) -> tuple[str, int] | None:
        """The next run; None if there is none left."""
        with self._lock:
            if self._n_begun == len(self.todo):
                return None
            self._n_begun += 1
            return self.todo[self._n_begun - 1]

    def end(self, record: Record) -> None:
        """Write a record and say what came of the run."""
        with self._lock:
            compared = self.plan.pairing["compared"]
            record = end_run(self.study, record, list(self.plan.arms), compared)
            self._n_now += 1
            self._seconds += record.seconds
            if record.status == "failed":
                self.failed[record.arm, record.seed] = record.error
            self.say(self._line(record))

    def _line(self, record: Record) -> str:
        n_left = len(self.todo) - self._n_now
        n_all = len(self.plan.runs)
        place = f"[{self._n_before + self._n_now:>{len(str(n_all))}}/{n_all}]"
        if record.status == "failed":
            what = f"failed: {record.error}"
        else:
            what = f"mIoU {100 * record.final:.2f} after {record.curve[-1][0]} steps"
        left = self._seconds / self._n_now * n_left / self.n_workers
        rest = f"; {n_left} left, about {duration(left)}" if n_left else ""
        return f"{place} {record.arm} seed {record.seed}: {what}, {duration(record.seconds)}{rest}"

    def run_here(self, execute: Execute) -> None:
        """Do all runs in this process."""
        while (run := self.next_run()) is not None:
            self.end(execute(self.study, self.plan, *run))

    def run_on(self, environments: Sequence[Mapping[str, str]]) -> None:
        """Do all runs in worker processes, one for each environment.

        Workers end with this process, however that ends.
        """
        self.n_workers = min(len(environments), max(1, len(self.todo)))
        workers = [Worker(self, each) for each in environments[: self.n_workers]]
        try:
            while any(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.join(timeout=0.2)  # a join without end would not hear Ctrl-C
        finally:
            for worker in workers:
                worker.stop()
        errors = [worker.error for worker in workers if worker.error is not None]
        if errors:
            raise errors[0]


class Worker(threading.Thread):
    """Hands runs to a process of its own, and takes a new one where that dies."""

    def __init__(self, schedule: Schedule, environment: Mapping[str, str]) -> None:
        super().__init__(daemon=True)
        self.schedule, self.environment = schedule, environment
        self.error: BaseException | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stops = False
        self.start()

    def run(self) -> None:
        """Do runs until there is none left."""
        try:
            while not self._stops and (run := self.schedule.next_run()) is not None:
                record = self._do(*run)
                if not self._stops:
                    self.schedule.end(record)
        except BaseException as error:
            self.error = error
        self.stop()
        self._forget()

    def stop(self) -> None:
        """End the process."""
        self._stops = True
        process = self._process  # the thread may let go of it meanwhile
        if process is not None:
            process.kill()
            process.wait()

    def _forget(self) -> None:
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process is not None else ():
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _do(self, arm: str, seed: int) -> Record:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        begun = time.perf_counter()
        task = {"study": str(self.schedule.study), "arm": arm, "seed": seed}
        answer = ""
        with suppress(BrokenPipeError):  # it has died: no answer
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer.endswith("\n"):
            return parse_record(answer)
        code = process.wait()
        self._forget()
        if code in TOLD_TO_STOP and not self._stops:
            raise StudyError(
                "a run was told to stop by a signal; `study --resume"
                f" {self.schedule.study}` begins it anew."
            )
        error = f"the process ended with code {code} in the middle of the run"
        error += ": it was killed, for want of memory perhaps." if code == -9 else "."
        return Record(arm, seed, "failed", error, time.perf_counter() - begun)

    def _start(self) -> subprocess.Popen[str]:
        package_root = str(Path(__file__).parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-m", "seglab", "study", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment},
            start_new_session=True,  # Ctrl-C is for the process that people see
        )


def as_line(record: Record) -> str:
    """A record as a worker answers."""
    return json.dumps(asdict(record))


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(42), duration(600), duration(7300)
    ('42 s', '10 min', '2 h 2 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
