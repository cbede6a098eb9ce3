"""The report of real tiny runs, read as a browser would, and compared with their files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from web_pages import Page, parse

from seglab.reporting.pages.page import write_report
from seglab.reporting.pages.run_files import ReportError, read_run

SECTIONS = ("results", "curves", "pictures", "scales", "cost", "environment", "config", "use")


@pytest.fixture(scope="module")
def trained(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run that a test may change."""
    folder = tmp_path_factory.mktemp("logs") / "tiny" / "version_0"
    shutil.copytree(fitted, folder)
    return folder


@pytest.fixture(scope="module")
def tested(trained: Path, run: Callable[..., None]) -> Path:
    """A test of the run's checkpoint, beside it."""
    root = trained.parents[1]
    checkpoint = trained / "checkpoints/best.ckpt"
    where = ("--trainer.default_root_dir", root, "--trainer.accelerator", "cpu")
    run("test", "--ckpt_path", checkpoint, *where)
    return root / "tiny" / "test_0"


@pytest.fixture(scope="module")
def written(trained: Path, tested: Path, run: Callable[..., None]) -> Path:
    run("report", trained)
    return trained / "report.html"


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return parse(written.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_page_is_valid_and_whole(page: Page) -> None:
    assert page.faults == []
    assert page.external == []
    assert {f"r0-{name}" for name in SECTIONS} <= page.ids.keys()
    assert page.count("main") == page.count("h1") == 1


def test_no_section_of_a_whole_run_is_missing(written: Path) -> None:
    assert 'class="missing"' not in written.read_text(encoding="utf-8")


def test_page_has_no_address_but_data(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import", text)


def test_classes_have_the_figures_of_the_files(page: Page, trained: Path, tested: Path) -> None:
    for folder in (trained, tested):
        results = json.loads((folder / "results.json").read_text())
        spans = {row["class"]: row for row in rows(folder / "intervals.csv")
                 if row["figure"] == "IoU"}  # fmt: skip
        for row in results["classes"]:
            if row["IoU"] is None:
                continue
            ends = [f"{100 * float(spans[row['name']][key]):.1f}" for key in ("low", "high")]
            wanted = [row["name"], f"{100 * row['IoU']:.2f}", " to ".join(ends)]
            assert any(cells[:3] == wanted for cells in page.rows), wanted


def test_matrix_is_that_of_the_file(page: Page, tested: Path) -> None:
    with (tested / "confusion.csv").open() as file:
        _, *table = csv.reader(file)
    for name, *cells in table:
        counts = [int(cell) for cell in cells]
        if sum(counts):
            shown = [f"{100 * count / sum(counts):.1f}" for count in counts]
            assert [name, *shown] in page.rows


def test_best_and_worst_are_shown_with_their_scores(written: Path, tested: Path) -> None:
    text = written.read_text(encoding="utf-8")
    scores = {row["name"]: float(row["mIoU"]) for row in rows(tested / "images.csv")}
    ranked = sorted(scores, key=scores.__getitem__)
    extremes = json.loads((tested / "extremes.json").read_text())
    kinds = {kind: [r["name"] for r in extremes if r["kind"] == kind] for kind in ("best", "worst")}
    assert kinds == {"worst": ranked[:3], "best": ranked[:-3:-1]}
    for name in ranked:
        assert f"{name}: mIoU {100 * scores[name]:.1f} %" in text


def test_scales_and_costs_are_those_of_the_run(page: Page, trained: Path) -> None:
    report = json.loads((trained / "scale_equalization.json").read_text())
    for row in report["rows"]:
        shown = [cells for cells in page.rows if cells[0] == row["fusion"]]
        assert any(cells[-2:] == [f"{row['std']:.4f}", f"{row['scale']:.4f}"] for cells in shown)
    results = json.loads((trained / "results.json").read_text())
    assert results["cost"]["train_images"] == 16
    assert results["cost"]["eval_images"] == 10
    assert ["parameters", f"{results['parameters']:,}"] in page.rows
    assert ["torch", results["environment"]["torch"]] in page.rows


def test_test_knows_the_step_of_its_checkpoint(trained: Path, tested: Path) -> None:
    steps = [json.loads((f / "results.json").read_text())["step"] for f in (trained, tested)]
    assert steps[0] == 4
    assert steps[1] in (2, 4)
    (picture,) = trained.glob("pictures/step_*4.png")
    assert picture.name == "step_0000004.png"


def test_card_says_what_the_files_say(trained: Path, written: Path, tested: Path) -> None:
    card = (written.parent / "model_card.md").read_text(encoding="utf-8")
    head, body = card.split("---\n")[1:3]
    assert yaml.safe_load(head)["library_name"] == "seglab"
    results = json.loads((tested / "results.json").read_text())
    assert f"| mean IoU | {100 * results['mIoU']:.2f} |" in body
    assert "UPerHead" in body
    assert "test_resnet" in body
    weak = [r["name"] for r in results["classes"] if r["IoU"] is not None and r["IoU"] < 0.5]
    assert f"IoU below 50 %: {', '.join(weak)}." in body
    for heading in ("Data", "Metrics", "Training", "Limits", "Use", "Config"):
        assert f"\n## {heading}\n" in body
    assert "\n\n\n" not in body


def test_half_empty_folder_says_what_makes_the_rest(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_3"
    folder.mkdir()
    shutil.copy(trained / "results.json", folder)
    write_report([folder], folder / "page.html", program="seglab")
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert parse(text).faults == []
    assert text.count('class="missing"') == 8
    command = f"seglab validate --ckpt_path {folder / 'checkpoints/best.ckpt'}"
    assert command in text


def test_run_that_has_not_ended_shows_its_curves(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_3"
    folder.mkdir()
    for name in ("metrics.csv", "config.yaml"):
        shutil.copy(trained / name, folder)
    write_report([folder], folder / "page.html", folder / "card.md")
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert parse(text).count("svg") == 4
    assert "Nothing has been evaluated to its end" in text
    assert "The model was not evaluated." in (folder / "card.md").read_text()


def test_files_of_another_evaluation_are_left_out(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_3"
    shutil.copytree(trained, folder)
    results = json.loads((folder / "results.json").read_text())
    results["mIoU"] += 0.01
    (folder / "results.json").write_text(json.dumps(results))
    (evaluation,) = read_run(folder).evaluations
    assert evaluation.confusion is None
    assert "another evaluation" in evaluation.remarks[0]
    write_report([folder], folder / "page.html")
    assert "another evaluation" in (folder / "page.html").read_text(encoding="utf-8")


def test_extra_metrics_are_on_page_and_card(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_4"
    shutil.copytree(trained, folder)
    assert "boundary IoU" not in _pages_of(folder)[0]
    results = json.loads((folder / "results.json").read_text())
    results |= {"mBoundaryIoU": 0.12345, "ECE": 0.23456}
    for index, row in enumerate(results["classes"]):
        row["BoundaryIoU"] = 0.3141 + index / 100
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "intervals.csv").open("a") as file:
        file.write("mBoundaryIoU,,0.12345,0.111,0.222\n")
    page, card = _pages_of(folder)
    cells = parse(page).rows
    assert ["mean boundary IoU", "12.35", "11.1 to 22.2"] in cells
    assert ["calibration error", "23.46", "\N{EN DASH}"] in cells
    assert any(row[0] == results["classes"][1]["name"] and "32.41" in row for row in cells)
    assert "| mean boundary IoU | 12.35 | 11.1 to 22.2 |" in card
    assert "| calibration error | 23.46 |" in card


def _pages_of(folder: Path) -> list[str]:
    write_report([folder], folder / "page.html", folder / "card.md")
    return [(folder / name).read_text(encoding="utf-8") for name in ("page.html", "card.md")]


def test_names_cannot_break_the_page(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>&'version_3"
    shutil.copytree(trained, folder)
    results = json.loads((folder / "results.json").read_text())
    for path in (folder / "results.json", folder / "intervals.csv", folder / "confusion.csv"):
        path.write_text(path.read_text().replace(results["classes"][0]["name"], "<i>|a</td>"))
    text_of_curves = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text_of_curves.replace("IoU/ground", "IoU/<i>|a</td>"))
    write_report([folder], folder / "page.html", folder / "card.md")
    page = parse((folder / "page.html").read_text(encoding="utf-8"))
    assert page.faults == []
    assert page.count("i") == 0
    assert "<i>\\|a</td>" in (folder / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["empty", "missing", "above"])
def test_folder_without_a_run_is_refused(what: str, trained: Path, tmp_path: Path) -> None:
    folder = {"empty": tmp_path, "missing": tmp_path / "none", "above": trained.parents[1]}[what]
    words = {"empty": "neither", "missing": "is no folder", "above": "runs in it: .*version_0"}
    with pytest.raises(ReportError, match=words[what]):
        write_report([folder], tmp_path / "page.html")


def test_missing_matplotlib_is_one_sentence(
    trained: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(SystemExit):
        run("report", trained)
    assert "pip install matplotlib" in capsys.readouterr().err


def test_run_is_given_once(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="given twice"):
        write_report([trained, trained / "."], tmp_path / "page.html")


def test_tensorboard_has_the_charts(fitted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fitted))
    events.Reload()
    assert [event.step for event in events.Images("charts/class_iou")] == [4]
    assert [event.step for event in events.Images("charts/scales")] == [0]
    assert {"scales.png", "class_iou.png"} <= {p.name for p in (fitted / "pictures").iterdir()}
