"""Two ways of doing the same, in one process: time in turn, and peak memory. Imported, not run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

Way = Callable[[], object]


def time_in_turn(ways: Mapping[str, Way], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times, in alternating order; one pass before is not timed."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            start = time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


HEADER = "| {} | whose | {} | ours is faster by | {} | ours takes |\n|---|---|--:|--:|--:|--:|"


def rows(name: str, times: Mapping[str, list[float]], peaks: Mapping[str, int]) -> str:
    """Lines of a table under `HEADER`, one for each way; the last way is ours.

    Milliseconds are medians. Ratios of times are taken turn by turn: median (least to greatest).
    """
    own = list(times)[-1]
    lines = []
    for way, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times[own], strict=True))
        faster = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        share = f"**{peaks[own] / peaks[way]:.2f}**"
        cells = [name, way, f"{statistics.median(seconds) * 1e3:.0f}", faster if way != own else ""]
        cells += [f"{peaks[way] / 1e6:.0f}", share if way != own else ""]
        lines.append(f"| {' | '.join(cells)} |")
        name = ""
    return "\n".join(lines)


def peak_bytes(way: Way, top: int = 0, device: str = "cpu") -> int:
    """Highest sum of allocations not yet freed; prints the `top` operators by their own time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        way()
    held = peak = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    operators = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in operators)
    for operator in operators[:top]:
        own = operator.self_cpu_time_total
        print(f"    {own / 1e3:9.1f} ms {own / total:6.1%} {operator.count:5d} x {operator.key}")
    return peak
