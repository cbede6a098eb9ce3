"""The page of the command line shows what is printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import complaint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/command_line.md").read_text()
SCREENS = re.findall(r"```\n\$ seglab ([^\n]*)\n(.*?)\n```", PAGE, re.S)
MISTAKES = re.findall(r"^\| `(.+?)` \| (.+) \| (\d\.\d+) \|$", PAGE, re.M)


@pytest.fixture(autouse=True)
def called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["seglab"])


@pytest.mark.parametrize(("typed", "shown"), SCREENS)
def test_screens_of_help_are_those_of_the_page(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str], typed: str, shown: str
) -> None:
    run(*typed.split())
    assert capsys.readouterr().out.rstrip() == shown


@pytest.mark.parametrize(("typed", "said"), [row[:2] for row in MISTAKES])
def test_mistakes_are_answered_as_on_the_page(typed: str, said: str) -> None:
    assert complaint(typed) == said


def test_page_has_screens_and_mistakes() -> None:
    assert len(SCREENS) == 2
    assert len(MISTAKES) >= 15
    assert all(float(seconds) < 2 for *_, seconds in MISTAKES)


def test_options_in_the_wrong_place_are_answered() -> None:
    said = complaint("predict --ckpt_path best.ckpt --optimize")
    assert said == "predict: --optimize needs images that are named: give --input FILES."
    assert "did you mean --output?" in complaint("report logs/a --ouput x.html")
