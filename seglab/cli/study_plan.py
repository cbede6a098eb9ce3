"""The plan that a command line of `study` asks for, and whether it is the one that is there."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from seglab.cli.arguments import Given, merge
from seglab.cli.check import SECTIONS, check_sections
from seglab.cli.study_run import config_of
from seglab.study.arms import Overrides, StudyError, read_arms, vary
from seglab.study.plan import MARGIN, METRIC, Plan, differences, read_plan, settled, with_more_seeds

SET_BY_STUDY = (
    *("accelerator", "devices", "logger", "enable_progress_bar", "enable_checkpointing"),
    "default_root_dir",
)
"""Keys of the trainer that every run of a study has from the study: no arm could change them."""

SPREAD = 0.5
"""Assumed deviation of paired differences over seeds, in points of mIoU, where none is given."""


def new_plan(options: Namespace, given: Given) -> Plan:
    """The plan that the options ask for.

    Raises:
        StudyError: Something is missing, or has no place in a study.
        ConfigError: A config or an arm that cannot be right.
    """
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
        power={**_spread(options.spread), "margin": options.margin or MARGIN},
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
    trainer = plan.arms[arm].get("trainer")
    for key in trainer if isinstance(trainer, dict) else ():
        if key.rstrip("+") in SET_BY_STUDY:
            raise StudyError(
                f"arm {arm} sets trainer.{key}, which a study sets for every run: leave it out,"
                " arms cannot differ in it."
            )
    tree = config_of(plan, arm)
    check_sections(Given(tree, {}, []))


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
        is_off = [name.partition(",")[0] == "off" for name in pair]
        second, first = pair if is_off == [False, True] else pair[::-1]
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
    """Kind of device of all runs: cpu, cuda or mps."""
    accelerator = (config.get("trainer") or {}).get("accelerator", "auto")
    if devices is not None:
        if devices != "cpu" and not all(number.isdigit() for number in devices.split(",")):
            raise StudyError(f"--devices {devices}: give cpu, or numbers of CUDA devices as 0,1.")
        return "cpu" if devices == "cpu" else "cuda"
    if accelerator != "auto":
        return "cuda" if accelerator == "gpu" else str(accelerator)
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def continued_plan(folder: Path, options: Namespace, given: Given) -> Plan:
    """The plan of a study that is there, with more seeds if they are asked for.

    Raises:
        StudyError: There is none, or something is asked for otherwise.
    """
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
    for key in ("spread", "margin"):
        if getattr(options, key) is not None:
            asked = replace(asked, power={**asked.power, key: getattr(options, key)})
    settings = {
        key: value
        for key in ("threads", "monitor_every", "keep_checkpoints")
        if (value := getattr(options, key)) is not None
    }
    if options.devices is not None:
        settings["device"] = _device(options.devices, config)
    return replace(asked, settings={**plan.settings, **settings})
