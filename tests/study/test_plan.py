"""The plan: written first, complete, and not changed behind one's back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from seglab.cli.run_folder import RunFolder
from seglab.study.plan import read_plan


@pytest.fixture
def planned(study: Callable[..., Path]) -> Callable[..., Path]:
    return lambda *args: study("--plan_only", *args)


def content(folder: Path) -> dict:
    return yaml.safe_load((folder / "plan.yaml").read_text())


def test_plan_says_what_is_compared_and_what_it_can_show(planned) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 8, "--spread", 0.4)
    plan = content(folder)
    assert [path.name for path in folder.iterdir()] == ["plan.yaml"]
    assert plan["primary"] == {"arm": "fold", "reference": "off", "metric": "final val/mIoU"}
    assert plan["power"]["smallest_effect"] == pytest.approx(0.4 * 1.1561, abs=1e-3)  # G*Power
    compared = ["initial weights", "training data", "validation labels"]
    assert plan["pairing"] == {"compared": compared, "left_out": {}}
    assert plan["config"]["data"]["init_args"]["size"] == 32
    assert plan["settings"]["device"] == "cpu"
    assert plan["versions"]["torch"].startswith("2.")
    assert plan["created"].endswith("+00:00")


def test_assumed_spread_is_called_so(planned, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planned("--arms", "off", "fold")
    assert content(folder)["power"]["spread_is"] == "assumed, nothing was measured"
    assert "points, if paired differences deviate by 0.5 (assumed" in capsys.readouterr().out


def test_order_is_shuffled_within_each_seed(planned) -> None:
    folder = planned("--arms", "off", "fold", "reparametrize", "placebo", "--seeds", 20)
    orders = [tuple(entry["arms"]) for entry in content(folder)["order"]]
    assert [entry["seed"] for entry in content(folder)["order"]] == list(range(20))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(orders)) > 10
    assert {order[0] for order in orders} == {"off", "fold", "reparametrize", "placebo"}


def test_overrides_and_variations_are_part_of_the_plan(planned) -> None:
    vary = ("--vary", "model.optimizer.lr=0.1,0.2")
    plan = content(planned("--arms", "off", "fold", *vary, "--trainer.max_steps", 7))
    assert plan["config"]["trainer"]["max_steps"] == 7
    assert plan["arms"]["fold,lr=0.2"]["model"] == {"optimizer": {"init_args": {"lr": 0.2}}}
    assert plan["primary"]["arm"] == "fold,lr=0.1"
    assert plan["primary"]["reference"] == "off,lr=0.1"


def test_primary_comparison_may_be_named(planned) -> None:
    arms = ("--arms", "off", "fold", "reparametrize", "--vary", "trainer.max_steps=3,4")
    folder = planned(*arms, "--primary", "reparametrize,max_steps=3-fold,max_steps=3")
    assert content(folder)["primary"]["arm"] == "reparametrize,max_steps=3"
    assert content(folder)["primary"]["reference"] == "fold,max_steps=3"


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"data": {"init_args": {"size": 64}}}, "training data"),
        ({"trainer": {"max_steps": 3}}, "training data"),
        ({"model": {"network": {"init_args": {"auxiliary": None}}}}, "initial weights"),
    ],
)
def test_pairing_that_arms_change_is_declared_off(planned, arms, overrides, what: str) -> None:
    plan = content(planned("--arms", arms(one={}, two=overrides)))
    assert what not in plan["pairing"]["compared"]
    assert "two sets" in plan["pairing"]["left_out"][what]


def refused(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_nothing_to_analyze_is_refused(planned, run, capsys) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 2)
    error = refused(lambda: run("study", "--analyze", folder), capsys)
    assert "no run of" in error
    assert "--resume" in error
    assert [path.name for path in folder.iterdir()] == ["plan.yaml"]


def test_one_arm_is_said_to_compare_nothing(planned, capsys) -> None:
    planned("--arms", "off", "--seeds", 2)
    assert "nothing is compared" in capsys.readouterr().out


def test_misspelt_option_is_one_sentence_with_the_right_one(run, capsys) -> None:
    error = refused(lambda: run("study", "--analyse", "anything"), capsys)
    assert "did you mean --analyze?" in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--trainer.max_steps", 9), "trainer.max_steps: null -> 9"),
        (("--seeds", 9), "seeds: [0, 1] -> [0, 1, 2, 3, 4, 5, 6, 7, 8]"),
        (("--arms", "off", "placebo"), "arms.placebo: null ->"),
        (("--primary", "off-fold"), "primary.arm: fold -> 'off'"),
        (("--spread", 2), "spread: 0.5 -> 2.0"),
        (("--monitor_every", 3), "settings.monitor_every: null -> 3"),
    ],
)
def test_resume_refuses_another_plan(planned, resume, capsys, args, words: str) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 2)
    before = (folder / "plan.yaml").read_bytes()
    error = refused(lambda: resume(folder, *args), capsys)
    assert words in error
    assert "was planned otherwise" in error
    assert (folder / "plan.yaml").read_bytes() == before


def test_same_command_continues_and_another_is_refused(planned, capsys) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 2)
    before = (folder / "plan.yaml").read_bytes()
    planned("--arms", "off", "fold", "--seeds", 2)
    error = refused(lambda: planned("--arms", "fold", "--seeds", 2), capsys)
    assert "arms.off: {scale_equalization: {mode: 'off'}} -> null" in error
    assert (folder / "plan.yaml").read_bytes() == before


def test_more_seeds_are_an_amendment(planned, resume) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 2)
    before = read_plan(folder)
    resume(folder, "--add_seeds", 3, "--plan_only")
    after = read_plan(folder)
    assert after.seeds == [0, 1, 2, 3, 4]
    assert after.order[:2] == before.order
    assert [entry["seed"] for entry in after.order] == after.seeds
    assert after.amendments[0]["what"] == "2 -> 5 seeds"
    assert after.amendments[0]["time"]
    assert after.created == before.created
    assert after.power["smallest_effect"] < before.power["smallest_effect"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--arms", "off", "fodl"), "there is no arm 'fodl'"),
        (("--arms", "off", "--primary", "off-fold"), "write ARM-REFERENCE, two of off"),
        (("--arms", "off", "--trainer.max_stepz", 3), "did you mean 'max_steps'"),
        (("--arms", "off", "--vary", "model.optimizer.lrr=1,2"), "SGD takes no 'lrr'"),
        (("--arms", "off", "--ckpt_path", __file__), "every run of a study begins at its init"),
        (("--arms", "off", "--trainer.devices", 8), "each run of a study takes one device"),
        (("--arms", "off", "--seeds", 0), "a study needs seeds"),
        (("--arms", "off", "--threads", 0), "--threads 0: give a number, 1 at least"),
        (("--arms", "off", "--monitor_every", -1), "--monitor_every -1: give a number, 0 at least"),
        (("--arms", "off", "--vary", "trainer.devices=1,2"), "which a study sets for every run"),
        ((), "nothing says what is compared"),
    ],
)
def test_mistakes_are_told_before_a_plan(study, tmp_path, capsys, args, words: str) -> None:
    assert words in refused(lambda: study(*args), capsys)
    assert not (tmp_path / "study").exists()


def test_arm_may_not_set_the_seed(study, arms, capsys) -> None:
    path = arms(one={}, two={"seed_everything": 3})
    assert "two sets seed_everything" in refused(lambda: study("--arms", path), capsys)


def test_first_variant_is_the_reference_of_the_second(planned) -> None:
    plan = content(planned("--arms", "off", "--vary", "model.optimizer.lr=0.1,0.2"))
    assert (plan["primary"]["arm"], plan["primary"]["reference"]) == ("off,lr=0.2", "off,lr=0.1")


def test_folder_without_plan_is_refused(resume, tmp_path, capsys) -> None:
    assert "holds no plan.yaml" in refused(lambda: resume(tmp_path), capsys)


def test_arms_file_of_the_documentation_makes_a_plan(planned, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    block = page.partition("# heads.yaml\n")[2].partition("```")[0]
    path = tmp_path / "heads.yaml"
    path.write_text(block)
    plan = content(planned("--arms", path, "--primary", "psp-uper"))
    assert list(plan["arms"]) == ["uper", "psp", "dice", "averaged"]
    assert "psp sets model.network" in plan["pairing"]["left_out"]["initial weights"]


def test_two_processes_do_not_share_a_study(planned, resume, capsys) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 1)
    lock = RunFolder(folder, made=[])
    try:
        assert "being written to by another" in refused(lambda: resume(folder), capsys)
    finally:
        lock.release()


def test_remarks_on_the_plan_are_said(planned, resume, capsys) -> None:
    folder = planned("--arms", "off", "fold", "--seeds", 2, "--data.seed", 3)
    assert "all seeds have one order of the data" in capsys.readouterr().out
    path = folder / "plan.yaml"
    path.write_text(path.read_text().replace("timm: ", "timm: 0.0 instead of "))
    resume(folder, "--plan_only")
    assert "not what the study was planned with: timm 0.0 instead of" in capsys.readouterr().out


def test_cuda_plan_is_not_run_without_a_device(planned, resume, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = planned("--arms", "off", "fold", "--seeds", 1, "--devices", "0")
    assert content(folder)["settings"] == {
        "device": "cuda",
        "threads": None,
        "monitor_every": None,
        "keep_checkpoints": False,
    }
    assert "this machine has none" in refused(lambda: resume(folder), capsys)
