"""The plan of a study: written before its first run, and what every run is taken from."""

from __future__ import annotations

import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from seglab.study.arms import Overrides, StudyError
from seglab.study.records import write_whole

FILE_NAME = "plan.yaml"
METRIC = "final val/mIoU"
ALPHA, POWER = 0.05, 0.8
MARGIN = 0.2  # points of mIoU that would matter, where none are given
HEAD = "# Written before the first run; `seglab study --resume FOLDER` takes every run from here.\n"
PACKAGES = ("seglab", "scale-equalization", "torch", "lightning", "timm", "numpy", "scipy")

WEIGHTS, DATA, LABELS = "initial weights", "training data", "validation labels"
CHANGES_WEIGHTS = ("model.network", "model.weights")
CHANGES_DATA = (
    "data",
    "model.total_batch",
    *(f"trainer.{name}" for name in ("max_steps", "max_epochs", "max_time", "min_steps")),
    *(f"trainer.{name}" for name in ("limit_train_batches", "overfit_batches", "min_epochs")),
    "trainer.accumulate_grad_batches",
)
"""Keys with which arms differ by design in what is otherwise compared."""


@dataclass(frozen=True)
class Plan:
    """What a study compares, and how.

    Attributes:
        config: All sections, without what the arms change.
        arms: Overrides by name.
        seeds: Each with one run of every arm.
        primary: `arm` minus `reference` of `metric` is the comparison that decides.
        power: The spread over seeds that was assumed, and the smallest effect that follows.
        settings: Of every run: device, threads, monitor_every, keep_checkpoints.
        pairing: `compared`: what must be equal in all arms of a seed; `left_out`: what differs by
            design, with the reason.
        order: Of the runs: for each seed its arms, shuffled.
        order_seed: Of the shuffling.
        versions: Of the packages that run it.
        created: When.
        amendments: What was changed since, and when.
    """

    config: Mapping[str, Any]
    arms: Mapping[str, Overrides]
    seeds: Sequence[int]
    primary: Mapping[str, str]
    power: Mapping[str, Any]
    settings: Mapping[str, Any]
    pairing: Mapping[str, Any] = field(default_factory=dict)
    order: Sequence[Mapping[str, Any]] = ()
    order_seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    amendments: Sequence[Mapping[str, Any]] = ()

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of every run, in their order."""
        return [(arm, entry["seed"]) for entry in self.order for arm in entry["arms"]]

    def write(self, study: Path) -> None:
        """Write `plan.yaml`, whole or not at all."""
        study.mkdir(parents=True, exist_ok=True)
        values = asdict(self)
        first = ("created", "primary", "power", "pairing", "seeds", "arms", "settings")
        ordered = {key: values.pop(key) for key in first} | values
        ordered["config"] = ordered.pop("config")  # the longest comes last
        text = HEAD + yaml.safe_dump(_plain(ordered), sort_keys=False, width=100)
        write_whole(study / FILE_NAME, text)


def read_plan(study: Path) -> Plan:
    """Read what `Plan.write` wrote.

    Raises:
        StudyError: The folder holds no plan, or one that has been cut off or misspelt.
    """
    path = study / FILE_NAME
    if not path.is_file():
        raise StudyError(f"{study} holds no {FILE_NAME}: it is no study, check the path.")
    try:
        return Plan(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise StudyError(
            f"{path} is no plan ({' '.join(str(error).split())}): restore it as it was written."
        ) from error


def settled(plan: Plan) -> Plan:
    """A plan with everything that follows from the rest: pairing, power, order, versions, time."""
    _require_runs(plan)
    smallest = {**plan.power, **_smallest(plan)}
    return replace(
        plan,
        pairing=pairing_of(plan.arms),
        power=smallest,
        order=shuffled(plan.arms, plan.seeds, plan.order_seed),
        versions=versions(),
        created=now(),
    )


def with_more_seeds(plan: Plan, n_more: int) -> Plan:
    """A plan with further seeds, and a note that says since when."""
    first = max(plan.seeds) + 1
    added = list(range(first, first + n_more))
    seeds = [*plan.seeds, *added]
    amended = replace(plan, seeds=seeds)
    note = {"time": now(), "what": f"{len(plan.seeds)} -> {len(seeds)} seeds", "seeds": added}
    return replace(
        amended,
        power={**plan.power, **_smallest(amended)},
        order=[*plan.order, *shuffled(plan.arms, added, plan.order_seed)],
        amendments=[*plan.amendments, note],
    )


def shuffled(
    arms: Mapping[str, Any], seeds: Sequence[int], order_seed: int
) -> list[dict[str, Any]]:
    """The order of the runs: seed by seed, the arms of each in an order of its own."""
    order = []
    for seed in seeds:
        names = list(arms)
        random.Random(f"{order_seed}/{seed}").shuffle(names)
        order.append({"seed": seed, "arms": names})
    return order


def pairing_of(arms: Mapping[str, Overrides]) -> dict[str, Any]:
    """What is compared among the arms of a seed, and what they change by design."""
    left_out = {}
    for what, keys in ((WEIGHTS, CHANGES_WEIGHTS), (DATA, CHANGES_DATA)):
        changed = [
            f"{name} sets {key}" for name, tree in arms.items() for key in keys if _sets(tree, key)
        ]
        if changed:
            left_out[what] = f"not comparable: {'; '.join(changed)}"
    return {
        "compared": [what for what in (WEIGHTS, DATA, LABELS) if what not in left_out],
        "left_out": left_out,
    }


def differences(old: Plan, new: Plan) -> list[str]:
    """What was asked for otherwise, as `key: old -> new`."""
    names = ("config", "arms", "seeds", "primary", "settings")
    before, after = ({name: _plain(getattr(plan, name)) for name in names} for plan in (old, new))
    for key in ("spread", "margin"):
        before[key], after[key] = old.power.get(key), new.power.get(key)
    return list(_differing("", before, after))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


def now() -> str:
    """The time as text, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _smallest(plan: Plan) -> dict[str, Any]:
    from seglab.study.power import smallest_effect

    n_seeds = len(plan.seeds)
    effect = smallest_effect(plan.power["spread"], n_seeds, ALPHA, POWER) if n_seeds > 1 else None
    return {
        "alpha": ALPHA,
        "power": POWER,
        "smallest_effect": None if effect is None else round(effect, 4),
        "unit": "points of mIoU; spread: deviation of paired differences over seeds",
    }


def _require_runs(plan: Plan) -> None:
    if not plan.arms:
        raise StudyError("a study needs arms: --arms off fold, or a file that ends in .yaml.")
    if not plan.seeds:
        raise StudyError("a study needs seeds: --seeds 8.")


def _sets(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or not (part in tree or f"{part}+" in tree):
            return False
        tree = tree.get(part)
    return True


def _differing(place: str, old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inside = f"{place}.{key}" if place else key
            yield from _differing(inside, old.get(key), new.get(key))
    elif old != new:
        yield f"{place.removeprefix('config.')}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
