"""Best and worst images against sorting all; places of the pictures; legends; costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from seglab.captions import Sample, captioned_grid, legend
from seglab.reporting.costs import Costs
from seglab.reporting.extremes import Extremes, merge
from seglab.reporting.pictures import draw_places, fit_places


def fill(found: Extremes, scores: list[float], batch_size: int) -> None:
    """Images whose grey level is their number, of sizes that differ between batches."""
    for first in range(0, len(scores), batch_size):
        part = torch.tensor(scores[first : first + batch_size], dtype=torch.float64)
        numbers = torch.arange(first, first + len(part))
        size = (6 + first, 12)
        image = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *size)
        label = numbers.view(-1, 1, 1).expand(-1, *size)
        found.update([f"n{n}" for n in numbers.tolist()], image, label, label + 100, part)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_extremes_are_those_of_sorting(batch_size: int) -> None:
    random = np.random.default_rng(0)
    scores = random.permutation(20).astype(float).tolist()
    scores[4] = scores[11] = float("nan")
    found = Extremes(n_kept=3, side=8)
    fill(found, scores, batch_size)
    order = [f"n{i}" for i in np.argsort(scores) if not np.isnan(scores[i])]
    assert [sample.name for sample in found.worst()] == order[:3]
    assert [sample.name for sample in found.best()] == order[:-4:-1]
    for sample in (*found.best(), *found.worst()):
        number = int(sample.name[1:])
        assert (sample.image == number).all()
        assert (sample.label == number).all()
        assert (sample.prediction == number + 100).all()
        assert max(sample.label.shape) == 8
        assert sample.image.shape[:2] == sample.label.shape


def test_few_images_are_best_or_worst_but_not_both() -> None:
    found = Extremes(n_kept=4, side=4)
    fill(found, [0.3, 0.1, float("nan"), 0.2], 4)
    best, worst = merge([(found.best(), found.worst())], 4)
    assert [[s.name for s in side] for side in (best, worst)] == [["n0"], ["n1", "n3"]]


def test_ranks_are_merged() -> None:
    parts = []
    for scores in ([0.5, 0.1], [0.9, 0.3]):
        samples = [Sample(str(s), *(np.zeros(1),) * 3, s) for s in scores]
        parts.append((samples, samples))
    best, worst = merge(parts, 1)
    assert (best[0].score, worst[0].score) == (0.9, 0.1)


@pytest.mark.parametrize(("n_batches", "batch_size"), [(1, 2), (2, 2), (9, 4), (100, 1)])
def test_one_place_is_drawn_from_each_part(n_batches: int, batch_size: int) -> None:
    places = draw_places(n_batches, batch_size, 4)
    flat = [batch * batch_size + place for batch, found in places.items() for place in found]
    total = n_batches * batch_size
    assert len(flat) == min(4, total)
    parts = [int(index * min(4, total) / total) for index in flat]
    assert parts == list(range(len(flat)))
    assert places == draw_places(n_batches, batch_size, 4)


def test_seed_chooses_other_places_than_the_first() -> None:
    drawn = {str(draw_places(50, 8, 4, seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert draw_places(float("inf"), 8, 4) == {0: [0, 1, 2, 3]}


def test_short_batch_gives_each_image_once() -> None:
    assert fit_places([5, 6, 7], 3) == [2, 0, 1]
    assert fit_places([1, 5, 6], 2) == [1, 0]


def test_legend_names_what_is_shown() -> None:
    colors = np.full((256, 3), 255, np.uint8)
    colors[:3] = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    picture = legend(np.array([0, 2, 255]), colors, ["a", "b", "c"], 300)
    shown = {tuple(color) for color in picture.reshape(-1, 3).tolist()}
    assert (200, 0, 0) in shown
    assert (0, 0, 200) in shown
    assert (0, 200, 0) not in shown
    narrow = legend(np.array([0, 2, 255]), colors, ["a", "b", "c"], 60)
    assert narrow.shape[0] > picture.shape[0]


def test_grid_has_every_row_and_its_words() -> None:
    blank = np.zeros((10, 20), np.uint8)
    image = np.full((10, 20, 3), (77, 200, 13), np.uint8)
    named = (("a", 0.5), ("b" * 200, float("nan")))
    samples = [Sample(name, image, blank, blank, score) for name, score in named]
    picture = captioned_grid(samples, np.full((256, 3), 9, np.uint8), ["x"], side=100)
    assert picture.shape[1] == 308
    assert (picture == image[0, 0]).all(-1).sum() == 2 * 50 * 100


def test_costs_leave_out_pictures_and_go_on_after_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("seglab.reporting.costs.time.perf_counter", lambda: clock[0])
    trainer: Any = SimpleNamespace(
        world_size=2, state=SimpleNamespace(fn="fit"), sanity_checking=False,
        strategy=SimpleNamespace(
            root_device=torch.device("cpu"),
            reduce=lambda local, reduce_op: 2 * local - 1,  # the other rank has one image less
        ),
    )  # fmt: skip
    task: Any = None
    costs, batch = Costs(), {"image": torch.zeros(4, 3, 1, 1)}

    def wait(seconds: float) -> None:
        clock[0] += seconds

    costs.setup(trainer, task, "fit")
    costs.load_state_dict({"train_images": 100, "train_seconds": 10.0})
    costs.on_train_start(trainer, task)
    wait(2)
    costs.on_train_batch_end(trainer, task, None, batch)
    wait(1)
    costs.on_validation_start(trainer, task)
    wait(4)
    costs.on_validation_batch_end(trainer, task, None, batch)
    costs.on_validation_epoch_end(trainer, task)
    wait(50)  # pictures and files
    costs.on_validation_end(trainer, task)
    wait(3)
    costs.on_train_end(trainer, task)
    found = costs.figures()
    assert (found["train_images"], found["train_seconds"]) == (108, 16)
    assert (found["eval_images"], found["eval_seconds"]) == (7, 4)
    assert found["eval_images_per_second"] == 7 / 4
    alone = Costs()
    alone.setup(trainer, task, "test")
    alone.load_state_dict(costs.state_dict())
    assert alone.figures().get("train_images") is None
