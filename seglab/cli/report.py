"""`report`: a page about runs that anybody can open, and a model card."""

from __future__ import annotations

from pathlib import Path

from seglab.cli.command_parser import CommandParser
from seglab.cli.program import command_line


def report(args: list[str]) -> None:
    """Write one HTML page about a run, or several side by side, and a model card."""
    parser = CommandParser("report", report.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="logs/.../version_N")
    parser.add_argument(
        "--output", type=Path, help="page to write; report.html in the first RUN if none"
    )
    parser.add_argument(
        "--card", type=Path, help="model card of the first RUN; model_card.md beside the page"
    )
    options = parser.parse_args(args)
    output = options.output or options.runs[0] / "report.html"
    card = options.card or output.with_name("model_card.md")
    if output.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--output {output} is no name of a page: end it in .html")
    if output.resolve() == card.resolve():
        parser.error(f"--output and --card are both {output}")
    from seglab.reporting.pages.page import write_report

    write_report(options.runs, output, card, command_line())
    print(f"report  {output}\ncard    {card}")
