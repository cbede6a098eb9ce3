"""`study`: a plan, then paired runs of every arm over seeds, resumable; the analysis reads them."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seglab.cli.arguments import Given, merge
from seglab.cli.check import SECTIONS, check_arguments, check_sections
from seglab.cli.program import command_line, program_name
from seglab.cli.run_folder import RunFolder
from seglab.cli.study_run import config_of, execute, serve
from seglab.study.arms import Overrides, StudyError, read_arms, vary
from seglab.study.plan import (
    FILE_NAME,
    METRIC,
    Plan,
    differences,
    read_plan,
    settled,
    with_more_seeds,
)
from seglab.study.scheduling import Schedule

if TYPE_CHECKING:
    from seglab.cli.experiment import Experiment

    Build = Callable[[list[str]], Experiment]

SPREAD = 0.5
"""Assumed deviation of paired differences over seeds, in points of mIoU, where none is given."""

OWN = ("resume", "config")  # options that `collect` takes for sections


def study(args: list[str], build: Build) -> None:
    """Plan a comparison of arms over seeds, and do the runs that are missing."""
    if args == ["--worker"]:
        serve(build)
        return
    options, rest = _parse(args)
    given = check_arguments(rest, is_whole=True) if rest else Given({}, {})
    folder = options.resume or options.output
    if options.resume is not None or (folder / FILE_NAME).is_file():
        plan = _continued(folder, options, given)
    else:
        plan = _planned(options, given)
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
    parser = ArgumentParser(
        prog=f"{program_name()} study",
        usage=f"{command_line()} study --config FILE --arms off fold --seeds 8 --output FOLDER"
        " [--SECTION.KEY VALUE ...]\n"
        f"       {command_line()} study --resume FOLDER",
        description=study.__doc__,
        epilog="built-in arms: off, fold, reparametrize, placebo, preserve_norm, explicit.\n"
        "FILE and --SECTION.KEY VALUE are those of fit and hold for every run.",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan = parser.add_argument_group("the plan")
    plan.add_argument("--arms", nargs="+", metavar="ARM", help="built-in arms; files of own ones")
    plan.add_argument("--vary", action="append", metavar="KEY=V,V", help="cross all arms with this")
    plan.add_argument("--seeds", type=int, metavar="N", help="runs of each arm; default 8")
    plan.add_argument("--primary", metavar="ARM-ARM", help="comparison that decides")
    plan.add_argument("--spread", type=float, help="deviation of paired differences, in points")
    plan.add_argument("--threads", type=int, help="threads of a run on the CPU")
    plan.add_argument("--monitor_every", type=int, metavar="N", help="steps; 0 never; default: 10x")
    plan.add_argument("--keep_checkpoints", action="store_true", default=None)
    runs = parser.add_argument_group("the runs")
    runs.add_argument("--output", type=Path, metavar="FOLDER", help="of the study")
    runs.add_argument("--resume", type=Path, metavar="FOLDER", help="do what is missing in it")
    runs.add_argument("--add_seeds", type=int, metavar="N", help="amend the plan, with --resume")
    runs.add_argument("--plan_only", action="store_true", help="write the plan and stop")
    runs.add_argument("--retry_failed", action="store_true", help="do failed runs again")
    runs.add_argument("--workers", type=int, help="processes on the CPU; 0: in this one")
    runs.add_argument("--devices", help="cpu, or numbers of CUDA devices such as 0,1")
    options, rest = parser.parse_known_args(args)
    if (options.resume is None) == (options.output is None):
        parser.error("give --output FOLDER for a new study, or --resume FOLDER")
    if options.add_seeds is not None and options.resume is None:
        parser.error("--add_seeds amends a study that is there: give --resume FOLDER")
    return options, rest


# -- the plan ------------------------------------------------------------------------------


def _planned(options: Namespace, given: Given) -> Plan:
    for section in ("data", "model"):
        if section not in given.tree:
            raise StudyError(
                f"nothing says what the {section} is: give a config with --config FILE, one of your"
                " own or one that is shipped, such as quickstart."
            )
    if options.arms is None:
        raise StudyError("nothing says what is compared: --arms off fold, for one.")
    plan = Plan(
        config=_config(given.tree),
        arms=_arms(options, given.tree),
        seeds=list(range(8 if options.seeds is None else options.seeds)),
        primary={},
        power=_spread(options.spread),
        settings=_settings(options, given.tree),
    )
    names = list(plan.arms)
    n_variants = len(names) // len(read_arms(options.arms))
    plan = replace(plan, primary=_primary(options.primary, names, n_variants))
    for arm in plan.arms:
        _check_arm(plan, arm)
    return settled(plan)


def _config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The sections alone; what has no place in a study is refused."""
    for key in ("ckpt_path", "resume"):
        if tree.get(key) is not None:
            raise StudyError(
                f"--{key}: every run of a study begins at its initialization; weights to begin with"
                " are given by --model.weights FILE."
            )
    config = {key: value for key, value in tree.items() if key in (*SECTIONS, "without")}
    n_devices = (config.get("trainer") or {}).get("devices", 1)
    if n_devices not in (1, "1", "auto", -1, "-1"):
        raise StudyError(
            f"trainer.devices is {n_devices!r}: each run of a study takes one device, and --devices"
            " spreads the runs; give --trainer.devices 1, with a total_batch that keeps the batch."
        )
    return config


def _arms(options: Namespace, config: Mapping[str, Any]) -> dict[str, Overrides]:
    return vary(read_arms(options.arms), options.vary or [], config)


def _check_arm(plan: Plan, arm: str) -> None:
    """Tell mistakes of an arm before anything runs."""
    for key in plan.arms[arm]:
        if key.rstrip("+") not in (*SECTIONS, "without"):
            raise StudyError(
                f"arm {arm} sets {key}, which is no section of a config that arms may differ in:"
                f" there are {', '.join(SECTIONS)}."
            )
    tree = config_of(plan, arm)
    check_sections(Given(tree, {}))


def _spread(spread: float | None) -> dict[str, Any]:
    if spread is None:
        return {"spread": SPREAD, "spread_is": "assumed, nothing was measured"}
    return {"spread": spread, "spread_is": "given by --spread"}


def _primary(text: str | None, arms: list[str], n_variants: int = 1) -> dict[str, str]:
    """The comparison that decides: of the first variants of the first two arms, if none is given.

    `n_variants` arms that stand one after another are one arm crossed with the values of --vary.
    """
    if text is None:
        if len(arms) < 2:
            return {}
        pair = arms[::n_variants][:2] if len(arms) > n_variants else arms[:2]
        second, first = pair if pair[1].partition(",")[0] == "off" else pair[::-1]
        return {"arm": second, "reference": first, "metric": METRIC}
    for place in (index for index, character in enumerate(text) if character == "-"):
        arm, reference = text[:place], text[place + 1 :]
        if arm in arms and reference in arms and arm != reference:
            return {"arm": arm, "reference": reference, "metric": METRIC}
    raise StudyError(f"--primary {text}: write ARM-REFERENCE, two of {', '.join(arms)}.")


def _settings(options: Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in every run, on whatever machine the study goes on."""
    device = _device(options.devices, config)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = max(1, (n_cores or 1) // max(1, options.workers or 1))
    threads = options.threads or int(os.environ.get("OMP_NUM_THREADS") or shared)
    return {
        "device": device,
        "threads": threads if device == "cpu" else None,
        "monitor_every": options.monitor_every,
        "keep_checkpoints": bool(options.keep_checkpoints),
    }


def _device(devices: str | None, config: Mapping[str, Any]) -> str:
    accelerator = (config.get("trainer") or {}).get("accelerator", "auto")
    if devices == "cpu" or (devices is None and accelerator == "cpu"):
        return "cpu"
    if devices is not None:
        return "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# -- a plan that is there --------------------------------------------------------------------


def _continued(folder: Path, options: Namespace, given: Given) -> Plan:
    """The plan of a study; refused if anything was asked for otherwise."""
    plan = read_plan(folder)
    different = differences(plan, _asked(plan, options, given))
    if different:
        raise StudyError(
            f"{folder} was planned otherwise: {'; '.join(different)}. A plan is not changed once it"
            " is written: leave these options out, or begin another study with --output."
        )
    if options.add_seeds is not None:
        if options.add_seeds < 1:
            raise StudyError(f"--add_seeds {options.add_seeds}: give the number of further seeds.")
        plan = with_more_seeds(plan, options.add_seeds)
        plan.write(folder)
    return plan


def _asked(plan: Plan, options: Namespace, given: Given) -> Plan:
    """The plan as the options of this call would have it."""
    config: dict[str, Any] = {}
    merge(config, dict(plan.config))
    if options.resume is None:
        config = {}
    merge(config, _config(given.tree))
    asked = replace(plan, config=config)
    if options.arms is not None:
        asked = replace(asked, arms=_arms(options, config))
    elif options.vary:
        raise StudyError("--vary goes with --arms.")
    if options.seeds is not None:
        asked = replace(asked, seeds=list(range(options.seeds)))
    if options.primary is not None:
        asked = replace(asked, primary=_primary(options.primary, list(asked.arms)))
    if options.spread is not None:
        asked = replace(asked, power={**plan.power, "spread": options.spread})
    settings = {
        key: value
        for key in ("threads", "monitor_every", "keep_checkpoints")
        if (value := getattr(options, key)) is not None
    }
    if options.devices is not None:
        settings["device"] = _device(options.devices, config)
    return replace(asked, settings={**plan.settings, **settings})


def _described(folder: Path, plan: Plan) -> str:
    lines = [
        f"{folder / FILE_NAME}: {len(plan.arms)} arms ({', '.join(plan.arms)}) x"
        f" {len(plan.seeds)} seeds = {len(plan.runs)} runs"
    ]
    if plan.primary:
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
    return "\n".join(lines)


# -- the runs --------------------------------------------------------------------------------


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
    print(f"{folder}: {len(plan.runs) - len(schedule.failed)} of {len(plan.runs)} runs finished")
    if schedule.failed:
        for (arm, seed), error in schedule.failed.items():
            print(f"  - {arm} seed {seed}: {error}")
        raise SystemExit(1)


def _environments(plan: Plan, options: Namespace) -> list[dict[str, str]]:
    """One for each worker."""
    if plan.settings["device"] == "cpu":
        n_threads = str(plan.settings["threads"])
        own = {"OMP_NUM_THREADS": n_threads, "MKL_NUM_THREADS": n_threads}
        return [own] * (1 if options.workers is None else options.workers)
    numbers = (options.devices or "").split(",") if options.devices else _cuda_devices()
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers] * (options.workers or 1)


def _cuda_devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
