"""Screens of help, and mistakes with what is said of them and when: two blocks of docs.

    python benchmarks/command_line.py [--screens]

Every mistake is typed into a process of its own; seconds are those of CPU time, from its start to
its end, on one thread: on a quiet machine they are what one waits, on a busy one more. The least of
three is taken. `--screens` prints the screens of help instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import subprocess
import sys
from pathlib import Path

from seglab.cli import main

ROOT = Path(__file__).parents[1]

SCREENS = ("--help", "fit --config quickstart --help")

MISTAKES = (
    "fot",
    "fit --config quikstart",
    "fit --config quickstart --trainer.max_epoch 3",
    "fit --config quickstart --trainer.max_steps many",
    "fit --config quickstart --trainer.strategy dpp",
    "fit --config quickstart --data.batch_size -1",
    "fit --config quickstart --data.crop_size 3",
    "fit --config quickstart --model.optimizer.lr fast",
    "fit --config quickstart --model.optimizer.betas 0.9",
    "fit --config quickstart --model.network foo.Bar",
    "fit --config quickstart --model.network.head UPerHaed",
    "fit --config quickstart --model.network.encoder.name resnet5o",
    "fit --config quickstart --model.weights nowhere.ckpt",
    "fit --config camvid/upernet_resnet18 --data.root nowhere",
    "fit --config quickstart --without scale_equalization",
    "fit --resume nowhere",
    "validate --ckpt_path nowhere.ckpt",
    "doctor --config quickstart --num_worker 4",
    "init nowhere",
    "prepare cocoo instances.json",
)


def screen(typed: str) -> str:
    """What a command prints that loads nothing."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(typed.split())
    return f"$ seglab {typed}\n{out.getvalue().rstrip()}"


def complaint(typed: str) -> str:
    """What is said of a mistake, with short names for this folder."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main(typed.split())
    return shortened(err.getvalue())


def shortened(said: str) -> str:
    """A sentence without the program's name and this machine's folders."""
    said = said.strip().removeprefix("seglab: ")
    return said.replace(f"{ROOT}/", "").replace(str(Path.cwd()), "FOLDER").replace("|", "\\|")


def seconds(typed: str) -> float:
    """CPU time of a fresh process."""
    command = [sys.executable, "-m", "seglab", *typed.split()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def least(typed: str) -> float:
    """The least of three measurements."""
    return min(seconds(typed) for _ in range(3))


def print_mistakes() -> None:
    """One row for each mistake."""
    print("| typed after `seglab` | said | seconds |")
    print("|---|---|--:|")
    for typed in MISTAKES:
        print(f"| `{typed}` | {complaint(typed)} | {least(typed):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", action="store_true")
    if parser.parse_args().screens:
        for each in SCREENS:
            print(f"```\n{screen(each)}\n```\n")
    else:
        print_mistakes()
