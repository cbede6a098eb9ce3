"""Sum fusion: where maps are added (FPN, LinkNet) the scale is pushed back into the producer.

A sum has no slice of its own for each branch. But a layer whose output reaches the sum through
steps with f(a x) = a f(x) only, and reaches nothing else, can be scaled instead: its weight and
bias times a. Whether it is so is found by doing it, with powers of two (`producers`). The paper
fuses by concatenation, so this is ours, and off unless asked for. Sums of more than two maps are
taken as pairs, in the order they are added in.

Where the summands have learned weights (BiFPN), these take up the scales instead (`edges`).
"""

from __future__ import annotations

from .edges import find_edge_sums
from .pairs import SumFusion, balance
from .producers import find_sums
from .scaling import describe_sums, scale_sums_

__all__ = ["SumFusion", "balance", "describe_sums", "find_edge_sums", "find_sums", "scale_sums_"]
