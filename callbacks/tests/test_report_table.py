"""The table of a report fits 100 columns and holds every name in full."""

from __future__ import annotations

import random

import pytest
from scale_equalization.table import table_lines

WORDS = ("network", "encoder", "model", "decode_head", "layers_3", "blocks", "0", "psp_modules")


def make_row(fusion: str, branch: int, source: str, note: str = "") -> dict[str, object]:
    numbers = {"start": 64 * branch, "stop": 64 * branch + 64, "mean": -0.5, "std": 12.25}
    resized = {"upsampling": 2 / 3, "interpolation": "bilinear"} if branch else {}
    return {
        "fusion": fusion,
        "branch": branch,
        "source": source,
        "note": note,
        "scale": 0.0816,
        "upsampling": 1.0,
        "interpolation": None,
        **numbers,
        **resized,
    }


def read_back(lines: list[str]) -> list[tuple[str, str]]:
    """Fusion and source of every branch, read from the printed lines alone."""
    shared = ""
    while not lines[0].startswith(("fusion ", "branch ")):
        shared += lines.pop(0).removeprefix("all names begin with ")
    head = lines.pop(0)
    at, end = head.index("from"), head.index("upsampling")
    has_column, fusion = head.startswith("fusion"), ""
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("    left alone"):
            continue
        if has_column and line[0] != " ":
            fusion = line.split()[0]
        if not has_column and line[0] != " ":
            fusion = line
        elif not has_column and line[2] != " ":
            fusion += line.strip()
        elif line[:at].strip():
            found.append([fusion, line[at:end].strip()])
        else:
            found[-1][1] += line.strip()
    return [(shared + a, "" if b == "input" else shared + b) for a, b in found]


@pytest.mark.parametrize("seed", range(40))
def test_names_of_any_length_are_kept_in_100_columns(seed: int) -> None:
    draw = random.Random(seed)

    def name() -> str:
        parts = draw.choices(WORDS, k=draw.randint(1, draw.choice((2, 5, 14))))
        return ".".join(["network", *parts] if seed % 2 else parts)

    rows = [
        make_row(fusion, branch, draw.choice((name(), name(), name(), "")))
        for fusion in {name(): None for _ in range(3)}
        for branch in range(draw.randint(1, 4))
    ]
    lines = table_lines(rows)
    assert max(map(len, lines)) <= 100
    assert read_back(lines) == [(row["fusion"], row["source"]) for row in rows]


def test_narrow_table_keeps_its_columns() -> None:
    rows = [make_row("fuse", 0, ""), make_row("fuse", 1, "coarse", "left alone: frozen")]
    assert table_lines(rows) == [
        "fusion  branch  channels  from    upsampling          mean      std   scale",
        "fuse         0      0:64  input   -                -0.5000  12.2500  0.0816",
        "             1    64:128  coarse  0.667x bilinear  -0.5000  12.2500  0.0816"
        "  left alone: frozen",
    ]


def test_notes_stand_below_their_branches_in_wide_tables() -> None:
    wide = "network.encoder.model.layers_3.blocks.1.mlp"
    rows = [make_row(f"{wide}.fuse", b, f"{wide}.{b}", "left alone: frozen" * b) for b in (0, 1)]
    lines = table_lines(rows)
    assert lines[0] == f"all names begin with {wide}."
    assert len(table_lines([])) == 1
    assert any("left alone: frozen" in line for line in lines)
