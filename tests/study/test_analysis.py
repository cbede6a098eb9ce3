"""A study's folder analyzed as a whole: every figure found again, whatever is missing."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic_studies import iou, rewrite, write_study

from seglab.study.analysis import analyze, main
from seglab.study.arms import StudyError
from seglab.study.pictures import draw_curves, draw_pairs
from seglab.study.plan import read_plan
from seglab.study.records import read_record, run_folder

ARMS = {"off": 0.0, "fold": 0.02, "placebo": 0.001}


def written(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads((folder / "study.json").read_text(), parse_constant=refuse)
    return found


def finals(folder: Path, arm: str, seeds: Any) -> np.ndarray:
    """From the counts, not from what was logged."""
    paths = [run_folder(folder, arm, seed) / "counts.npz" for seed in seeds]
    return 100 * np.array([np.nanmean(iou(np.load(path)["counts"])) for path in paths])


def test_figures_are_those_of_the_runs(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 8)
    analyze(tmp_path)
    found = written(tmp_path)
    fold, off = (finals(tmp_path, arm, range(8)) for arm in ("fold", "off"))
    expected = stats.ttest_rel(fold, off)
    first = found["comparisons"][0]
    assert first["primary"]
    assert [first[key] for key in ("treatment", "control", "metric")] == ["fold", "off", "final"]
    assert first["mean"] == pytest.approx((fold - off).mean())
    assert first["tests"]["t"] == pytest.approx(expected.pvalue)
    assert first["t_interval"] == pytest.approx([*expected.confidence_interval()])
    assert first["images"]["images"][0] <= first["mean"] <= first["images"]["images"][1]
    assert first["verdict"].startswith("better by at least")
    against_off = [
        c for c in found["comparisons"] if c["control"] == "off" and c["metric"] == "final"
    ]
    p = sorted(c["tests"]["t"] for c in against_off)
    corrected = sorted(c["corrected"]["t"] for c in against_off)
    assert corrected == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    names = {(c["treatment"], c["control"], c["metric"]) for c in found["comparisons"]}
    assert names == {
        *((arm, "off", m) for arm in ("fold", "placebo") for m in ("final", "best", "area")),
        ("fold", "placebo", "final"),
    }
    assert sum(c["primary"] for c in found["comparisons"]) == 1
    road, *_, absent = found["classes"]["fold"]
    assert road["n_pairs"] == 8
    assert (absent["n_pairs"], absent["mean"]) == (0, None)


def test_rows_are_one_per_planned_run(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 3, failed=[("fold", 1)], missing=[("placebo", 2)])
    analyze(tmp_path)
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}
    assert [*rows] == [(arm, seed) for arm in ARMS for seed in range(3)]
    assert float(rows["off", 2]["final"]) == pytest.approx(*finals(tmp_path, "off", [2]), abs=1e-3)
    assert rows["off", 0]["IoU absent"] == ""
    assert rows["fold", 1]["status"] == "failed"
    assert rows["fold", 1]["final"] == rows["placebo", 2]["final"] == ""
    assert rows["placebo", 2]["status"] == "missing"


def test_failed_and_missing_runs_are_told_and_not_counted(tmp_path: Path) -> None:
    runs = {"failed": [("fold", 1)], "missing": [("off", 2)], "unpaired": [("fold", 3)]}
    write_study(tmp_path, ARMS, 6, **runs)
    found = analyze(tmp_path)
    assert found.primary.pairs.seeds == (0, 4, 5)
    assert found.primary.pairs.left_out == {
        1: "fold failed: CUDA out of memory",
        2: "off has not ended yet",
        3: "no pair: initial weights of fold and off are not equal",
    }
    assert written(tmp_path)["runs"] == {
        "planned": 18,
        "finished": 16,
        "failed": [{"arm": "fold", "seed": 1, "error": "CUDA out of memory"}],
        "missing": [{"arm": "off", "seed": 2}],
    }
    for page in ("study.md", "study.html"):
        text = (tmp_path / page).read_text()
        for told in ("Preliminary (runs missing: 1)", "1 of 18 (off 2)", "CUDA out of memory"):
            assert told in text
        assert "initial weights of fold and off are not equal" in text


def test_nothing_has_ended_yet(tmp_path: Path) -> None:
    everything = [(arm, seed) for arm in ARMS for seed in range(2)]
    write_study(tmp_path, ARMS, 2, missing=everything)
    assert analyze(tmp_path).primary.verdict == "nothing to compare: no pair"
    assert "6 of 6" in (tmp_path / "study.html").read_text()


def test_one_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 1)
    found = analyze(tmp_path).primary
    assert found.t_interval is found.seeds_interval is found.seeds_needed is None
    assert found.verdict.startswith("one pair")
    assert found.images is not None
    assert found.images.images is not None
    assert "One seed: nothing here says" in (tmp_path / "study.md").read_text()


def test_arm_equal_to_the_control_is_identical(tmp_path: Path) -> None:
    write_study(tmp_path, {"off": 0.0, "same": 0.0}, 3, spread=0.0)
    assert analyze(tmp_path).primary.verdict == "identical in all 3 pairs: no spread, hence no test"
    assert written(tmp_path)["comparisons"][0]["tests"]["t"] is None


def test_variants_are_compared_at_their_own_values(tmp_path: Path) -> None:
    """Whether a gain survives another rate is asked at that rate."""
    arms = {"off,lr=1": 0.0, "off,lr=2": 0.05, "fold,lr=1": 0.02, "fold,lr=2": 0.055}
    primary = {"arm": "fold,lr=1", "reference": "off,lr=1"}
    found = analyze(write_study(tmp_path, arms, 8, primary=primary))
    names = [
        (c.pairs.treatment, c.pairs.control) for c in found.comparisons if c.pairs.metric == "final"
    ]
    assert len(set(names)) == len(names)
    index = names.index(("fold,lr=2", "off,lr=2"))
    fold, off = (finals(tmp_path, arm, range(8)) for arm in ("fold,lr=2", "off,lr=2"))
    assert found.comparisons[index].mean == pytest.approx(float(np.mean(fold - off)))
    assert found.comparisons[index].n_family == 1


def test_second_analysis_writes_the_same_bytes(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 4)
    analyze(tmp_path)
    files = [tmp_path / f"study.{kind}" for kind in ("json", "csv", "md", "html")]
    before = [path.read_bytes() for path in files]
    analyze(tmp_path)
    assert [path.read_bytes() for path in files] == before


def test_primary_metric_and_margin_are_as_asked(tmp_path: Path) -> None:
    primary = {"arm": "placebo", "reference": "off", "metric": "best val/mIoU"}
    write_study(tmp_path, ARMS, 4, primary=primary)
    first, *others = analyze(tmp_path, margin=50).comparisons
    assert (first.pairs.treatment, first.pairs.metric, first.primary) == ("placebo", "best", True)
    assert not any(each.primary for each in others)
    assert "50 points" in first.verdict


class Links(HTMLParser):
    """Gathers what a page would load, its ids and what refers to them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.ids, self.used = [], [], []
        self.feed(text)
        self.used += re.findall(r"url\(#([^)]*)\)", text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                (self.used if value.startswith("#") else self.loaded).append(value.lstrip("#"))
            self.ids += [value] if name == "id" else []


def test_page_needs_no_other_file(tmp_path: Path) -> None:
    write_study(tmp_path, {"off": 0.0, "a<b>|c": 0.01}, 3)
    analyze(tmp_path)
    page = (tmp_path / "study.html").read_text()
    links = Links(page)
    assert links.loaded == []
    assert len(set(links.ids)) == len(links.ids)
    assert {*links.used} <= {*links.ids}
    assert page.count("<svg") == 4
    assert "a<b>" not in page
    assert "a&lt;b&gt;|c - off" in page
    lines = (tmp_path / "study.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables if "primary" in line}) == 1
    pictures = re.findall(r"\]\((pictures/[^)]*)\)", "\n".join(lines))
    assert len(pictures) == 4
    assert all((tmp_path / name).read_text().rstrip().endswith("</svg>") for name in pictures)


def test_pages_are_written_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(tmp_path, ARMS, 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    analyze(tmp_path)
    for page in ("study.md", "study.html"):
        text = (tmp_path / page).read_text()
        assert "pip install" in text
        assert "<svg" not in text
        assert "Tests and power" in text


def test_runs_that_were_not_planned_are_told(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 3)
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace("- 2\n", "").replace("  placebo: {}\n", ""))
    found = analyze(tmp_path)
    assert found.primary.pairs.seeds == (0, 1)
    assert "Not in the plan, hence left out: fold 2, off 2, placebo 0" in found.study.remarks[-1]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("arm: fold", "arm: fald", "primary arm of .* is 'fald', which is none of its"),
        ("reference: 'off'", "reference: fold", "compares 'fold' with itself"),
        ("metric: final", "metric: loss", "begins with 'loss', but must with one of final, best"),
        ("seeds:", "seed:", "lacks seeds"),
    ],
)
def test_plan_without_a_comparison_is_refused(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    plan = write_study(tmp_path, ARMS, 1) / "plan.yaml"
    plan.write_text(plan.read_text().replace(old, new))
    with pytest.raises(ValueError, match=sentence):
        analyze(tmp_path)


def test_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no plan"):
        analyze(tmp_path)


@pytest.mark.parametrize("margin", [0, -1, float("nan"), float("inf")])
def test_margin_without_a_meaning_is_refused(tmp_path: Path, margin: float) -> None:
    write_study(tmp_path, ARMS, 1)
    with pytest.raises(ValueError, match="positive number of points"):
        analyze(tmp_path, margin)


def test_record_that_cannot_be_read_names_the_cure(tmp_path: Path) -> None:
    folder = run_folder(write_study(tmp_path, ARMS, 1), "fold", 0)
    whole = (folder / "run.json").read_text()
    rewrite(folder, surprise=1)
    for text in ((folder / "run.json").read_text(), "", whole[:200], "[]", '{"arm": "fold"}'):
        (folder / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run.json cannot be read .*: remove .*fold/seed_0, "):
            analyze(tmp_path)


def test_counts_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    path = run_folder(write_study(tmp_path, ARMS, 4), "fold", 0) / "counts.npz"
    whole = path.read_bytes()
    for n_bytes in (0, 200, len(whole) - 30):
        path.write_bytes(whole[:n_bytes])
        images = analyze(tmp_path).primary.images
        assert images is not None
        assert list(images.left_out) == [0]
        assert "counts.npz of fold cannot be read" in images.left_out[0]


@pytest.mark.parametrize("text", ["", "a: [", "words", "arms: [a]\nseeds: [0"])
def test_plan_that_was_cut_off_is_refused(tmp_path: Path, text: str) -> None:
    (write_study(tmp_path, ARMS, 1) / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"plan.yaml (is no YAML|lacks)"):
        analyze(tmp_path)
    with pytest.raises(StudyError, match=r"plan.yaml is no plan"):
        read_plan(tmp_path)


def test_command_prints_the_verdict_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ARMS, 4)
    main([str(tmp_path), "--margin", "0.3"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("fold - off, final mIoU: better by at least")
    assert last == str(tmp_path / "study.html")


def test_many_arms_of_long_names_are_told_apart(tmp_path: Path) -> None:
    """Names side by side do not overlap; equal colours are no equal lines; a point is seen."""
    names = ["off", *(f"fold,lr=0.{i},momentum=0.9" for i in range(7))]
    write_study(tmp_path, dict.fromkeys(names, 0.0), 2)
    for name in names:
        for seed in range(2):
            record = read_record(run_folder(tmp_path, name, seed))
            rewrite(run_folder(tmp_path, name, seed), curve=record.curve[-1:])
    found = analyze(tmp_path)
    (labels,) = draw_pairs(found).axes
    assert {text.get_rotation() for text in labels.get_xticklabels()} == {30}
    done = {arm: [found.study.runs[arm, seed] for seed in range(2)] for arm in names}
    lines = draw_curves(done, found).axes[0].get_lines()
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(names)
    assert {line.get_marker() for line in lines} == {"o"}
