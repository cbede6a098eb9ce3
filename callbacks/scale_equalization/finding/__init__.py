"""Finds every layer of a network that fuses concatenated feature maps; changes nothing.

Why probing proves. A floating-point number times a power of two is exact, and so is every sum and
product of numbers that all carry the same power. The network is run once with random values in the
place of what it concatenates, and again with part i of each concatenation multiplied by 2**k_i. A
linear layer whose input changed gives out what it gave in the first run, so that everything behind
it stays as it was and no level sees another's probe. Then, channel by channel of a layer's input:

- The second input is 2**k times the first, bit by bit, for one k: this channel is made of the parts
  with that power alone, by steps with f(a x) = a f(x). Dividing the part and dividing the weight's
  slice are the same.
- k = 0: the part does not reach it.
- Anything else: something changed the scale or mixed branches. The layer is refused.

The powers 2**base ... 2**(2 base - 1) are told apart in one run, and two of them multiplied never
look like a third; more parts take more runs, as digits. Concatenations behind one another without a
linear layer between are probed in different runs, so that each channel gets one label for each.
Three more things are looked at in the same way. All parts are multiplied by numbers that are no
powers of two, because rounding to a few bits is proportional in powers of two only. Every map that
a layer, a norm or an activation makes is multiplied: a layer whose input channels carry several of
these powers, and no concatenation, takes maps that were put together by something else. And all is
done once more in eval mode, where a network may use a layer in another way.

What is left: a nonlinearity that random values do not meet, or that later batches alone show. That
is what `proving` is for, with real batches and the real factors.

Operations are known by name only where it is about where to look (what joins maps, what is a linear
layer) and about what a report says.
"""

from __future__ import annotations

from scale_equalization.patterns import DEFAULT_EXCLUDE

from .finder import examine, find_fusions, require_fusions, watching
from .observer import Observer

__all__ = [
    "DEFAULT_EXCLUDE",
    "Observer",
    "examine",
    "find_fusions",
    "require_fusions",
    "watching",
]
