"""`study`: a plan, then paired runs of every arm over seeds, resumable; the analysis reads them."""

from __future__ import annotations

import os
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from seglab.cli.arguments import Given
from seglab.cli.check import check_arguments
from seglab.cli.command_parser import CommandParser
from seglab.cli.program import command_line
from seglab.cli.run_folder import RunFolder
from seglab.cli.study_plan import continued_plan, new_plan
from seglab.cli.study_run import execute, serve
from seglab.study.arms import StudyError
from seglab.study.plan import FILE_NAME, Plan, versions
from seglab.study.records import read_records
from seglab.study.scheduling import Schedule

if TYPE_CHECKING:
    from seglab.cli.experiment import Experiment

    Build = Callable[[list[str]], Experiment]


MONITOR_HELP = "steps between measurements of the branches; 0: none; default: a tenth of the run"


def study(args: list[str], build: Build) -> None:
    """Plan a comparison of arms over seeds, and do the runs that are missing."""
    if args == ["--worker"]:
        serve(build)
        return
    options, rest = _parse(args)
    if options.analyze is not None:
        _refuse_without_runs(options.analyze)
        _analyze(options.analyze, options.margin)
        return
    given = check_arguments(rest, is_whole=True) if rest else Given({}, {}, [])
    folder = options.resume or options.output
    if options.resume is not None or (folder / FILE_NAME).is_file():
        plan = continued_plan(folder, options, given)
    else:
        plan = new_plan(options, given)
        plan.write(folder)
    print(_described(folder, plan))
    if options.plan_only:
        return
    lock = RunFolder(folder, made=[])
    try:
        _run(folder, plan, options, build)
    finally:
        lock.release()


def _parse(args: list[str]) -> tuple[Namespace, list[str]]:
    door = f"{command_line()} study"
    parser = CommandParser(
        "study",
        study.__doc__,
        usage=f"{door} --config FILE --arms off fold --seeds 8 --output FOLDER"
        " [--SECTION.KEY VALUE ...]\n"
        f"       {door} --resume FOLDER\n"
        f"       {door} --analyze FOLDER",
    )
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = (
        "built-in arms: off, fold, reparametrize, placebo, preserve_norm, explicit.\n"
        "FILE and --SECTION.KEY VALUE are those of fit and hold for every run."
    )
    plan = parser.add_argument_group("the plan")
    plan.add_argument("--arms", nargs="+", metavar="ARM", help="built-in arms; files of own ones")
    plan.add_argument("--vary", action="append", metavar="KEY=V,V", help="cross all arms with this")
    plan.add_argument("--seeds", type=int, metavar="N", help="runs of each arm; default 8")
    plan.add_argument("--primary", metavar="ARM-ARM", help="comparison that decides")
    plan.add_argument(
        "--margin", type=float, help="points that would matter; less is equivalent; default 0.2"
    )
    plan.add_argument("--spread", type=float, help="deviation of paired differences, in points")
    plan.add_argument("--threads", type=int, help="threads of a run on the CPU")
    plan.add_argument("--monitor_every", type=int, metavar="N", help=MONITOR_HELP)
    plan.add_argument("--keep_checkpoints", action="store_true", default=None)
    runs = parser.add_argument_group("the runs")
    runs.add_argument("--output", type=Path, metavar="FOLDER", help="of the study")
    runs.add_argument("--resume", type=Path, metavar="FOLDER", help="do what is missing in it")
    runs.add_argument("--analyze", type=Path, metavar="FOLDER", help="tables, verdicts, a page")
    runs.add_argument("--add_seeds", type=int, metavar="N", help="amend the plan, with --resume")
    runs.add_argument("--plan_only", action="store_true", help="write the plan and stop")
    runs.add_argument("--retry_failed", action="store_true", help="do failed runs again")
    runs.add_argument("--workers", type=int, help="processes on the CPU; 0: in this one")
    runs.add_argument("--devices", help="cpu, or numbers of CUDA devices such as 0,1")
    options, rest = parser.parse_known_args(args)
    own = [f"--{name}" for name in vars(options)]
    for item in rest:  # what is left are settings of fit
        if item.startswith("--") and get_close_matches(item, own, 1, 0.8):
            parser.error(f"unrecognized arguments: {item}")
    doors = [options.output, options.resume, options.analyze]
    if sum(door is not None for door in doors) != 1:
        parser.error("give one: --output FOLDER for a new study, --resume FOLDER, --analyze FOLDER")
    if options.margin is not None and not 0 < options.margin < 100:
        parser.error(f"--margin {options.margin}: give points of mIoU, above 0")
    if options.analyze is not None and rest:
        parser.error(f"--analyze reads everything from the study's folder: leave out {rest[0]}")
    if options.add_seeds is not None and options.resume is None:
        parser.error("--add_seeds amends a study that is there: give --resume FOLDER")
    for name, least in (("threads", 1), ("monitor_every", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: give a number, {least} at least")
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers {options.workers}: give a number of processes, 0 for this one")
    return options, rest


def _described(folder: Path, plan: Plan) -> str:
    lines = [
        f"{folder / FILE_NAME}: {len(plan.arms)} arms ({', '.join(plan.arms)}) x"
        f" {len(plan.seeds)} seeds = {len(plan.runs)} runs"
    ]
    if not plan.primary:
        lines.append("one arm: its runs are done, and nothing is compared")
    else:
        lines.append(
            f"primary comparison: {plan.primary['arm']} - {plan.primary['reference']},"
            f" {plan.primary['metric']}"
        )
    effect = plan.power.get("smallest_effect")
    if effect is not None:
        lines.append(
            f"smallest effect that {len(plan.seeds)} seeds show with probability"
            f" {plan.power['power']}: {effect:.2f} points, if paired differences deviate by"
            f" {plan.power['spread']} ({plan.power['spread_is']})"
        )
    lines += [f"{what}: {why}" for what, why in plan.pairing["left_out"].items()]
    data = plan.config["data"]
    if isinstance(data, dict) and (data.get("init_args") or {}).get("seed") is not None:
        lines.append("data.seed is set: all seeds have one order of the data and one augmentation")
    now = versions()
    changed = [f"{k} {v} -> {now.get(k)}" for k, v in plan.versions.items() if now.get(k) != v]
    if changed:
        lines.append(f"not what the study was planned with: {', '.join(changed)}")
    return "\n".join(lines)


def _run(folder: Path, plan: Plan, options: Namespace, build: Build) -> None:
    schedule = Schedule(folder, plan, options.retry_failed, say=partial(print, flush=True))
    n_failed_before = len(schedule.failed)
    if n_failed_before:
        print(f"{n_failed_before} failed before and are left; --retry_failed does them again")
    try:
        if options.workers == 0:
            schedule.run_here(partial(execute, build))
        elif schedule.todo:
            schedule.run_on(_environments(plan, options))
    except KeyboardInterrupt:
        print(f"stopped; continue with: {command_line()} study --resume {folder}")
        raise
    n_finished = len(plan.runs) - len(schedule.failed)
    print(f"{folder}: {n_finished} of {len(plan.runs)} runs finished")
    if plan.primary:
        _analyze(folder, None)
    if schedule.failed:
        for (arm, seed), error in schedule.failed.items():
            print(f"  - {arm} seed {seed}: {error}")
        raise SystemExit(1)


def _refuse_without_runs(folder: Path) -> None:
    if (folder / FILE_NAME).is_file() and not any(read_records(folder)):
        raise StudyError(
            f"no run of {folder} has ended, so there is nothing to analyze:"
            f" {command_line()} study --resume {folder} does the runs."
        )


def _analyze(folder: Path, margin: float | None) -> None:
    """Write tables, pictures and a page into the study's folder, and print the verdicts."""
    from seglab.study.analysis import analyze
    from seglab.study.pages import console

    print(console(analyze(folder, margin)))


def _environments(plan: Plan, options: Namespace) -> list[dict[str, str]]:
    """One for each worker."""
    n_workers = 1 if options.workers is None else options.workers
    if plan.settings["device"] != "cuda":
        n_threads = str(plan.settings["threads"])
        own = {"OMP_NUM_THREADS": n_threads, "MKL_NUM_THREADS": n_threads}
        return [own if plan.settings["device"] == "cpu" else {}] * n_workers
    numbers = options.devices.split(",") if options.devices else _cuda_devices()
    if not numbers:
        raise StudyError(
            "the plan says that runs are done on CUDA devices, and this machine has none: go on"
            " where it has, or begin another study with --devices cpu."
        )
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers] * n_workers


def _cuda_devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
