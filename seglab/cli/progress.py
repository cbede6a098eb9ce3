"""A bar on the terminal for `prepare`, `convert_labels` and `doctor`."""

from collections.abc import Iterator
from contextlib import contextmanager

from seglab.data.download import Progress


@contextmanager
def progress_bar(unit: str = "bytes") -> Iterator[Progress]:
    """Show what is done, one line per file or split.

    Args:
        unit: "bytes" prints sizes and speed, anything else counts.

    Yields:
        What the functions take as `progress`.

    >>> with progress_bar("images") as progress:
    ...     progress("train", 1, 2)
    """
    from rich import progress as rich
    from rich.console import Console

    amount = [rich.DownloadColumn(), rich.TransferSpeedColumn()]
    counted = [rich.MofNCompleteColumn(), rich.TextColumn(f"{unit} {{task.fields[rate]}}")]
    columns = [
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        *(amount if unit == "bytes" else counted),
        rich.TimeRemainingColumn(),
    ]
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        lines: dict[str, rich.TaskID] = {}

        def show(what: str, n_done: int, n_total: int | None) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=n_total, rate="")
            speed = next(task.speed for task in bar.tasks if task.id == lines[what])
            rate = f"{speed:.3g}/s" if speed else ""
            bar.update(lines[what], completed=n_done, total=n_total, rate=rate)

        yield show
