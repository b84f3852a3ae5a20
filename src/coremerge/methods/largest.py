"""The k-th largest of many numbers that are never in memory together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 1 << 18
"""Different sizes that are told apart: 4 MB of them. With more, near ones are taken together, as many as it takes."""

DROPPED = 16
"""Of the 52 binary digits of a size, at least so many do not count: 36 tell sizes apart by 1.5e-11."""

MARGIN = 1e-12
"""A size that is computed a second time may come out smaller by so much of itself."""

PART = 1 << 22
"""Numbers that are sorted at once."""


@dataclass(frozen=True)
class Tally:
    """How many numbers there are of each size.

    Which sizes are taken together depends on all the numbers, and not on the order in which they are counted: the
    fewest digits are dropped that leave no more than :data:`MOST` sizes.

    Attributes:
        keys: (k,), ascending: the sizes in float64, as whole numbers, without their last ``dropped`` binary digits.
        counts: (k,).
        dropped: binary digits that do not count.
    """

    keys: Tensor
    counts: Tensor
    dropped: int = DROPPED

    @property
    def total(self) -> int:
        """How many numbers were counted."""
        return int(self.counts.sum())

    def largest(self, k: int) -> float:
        """A size that the ``k`` largest numbers have at least, and others only where they are nearly as large."""
        place = int((self.counts.flip(0).cumsum(0) < k).sum())
        key = self.keys.flip(0)[min(place, len(self.keys) - 1)]
        return float((key << self.dropped).view(torch.float64)) * (1 - MARGIN)


def tally(x: Tensor) -> Tally:
    """Of the magnitudes of all entries of ``x``.

    Example:
        >>> counted = tally(torch.tensor([0.5, -3.0, 1.0, 0.0]))
        >>> counted.total, [round(counted.largest(k), 6) for k in (1, 2, 3, 4)]
        (4, [3.0, 1.0, 0.5, 0.0])
    """
    return joined([_of_part(part) for part in torch.split(x.flatten(), PART)])


def _of_part(x: Tensor) -> Tally:
    keys, counts = torch.unique(x.abs().double().view(torch.int64) >> DROPPED, return_counts=True)
    return _coarse(Tally(keys.cpu(), counts.cpu()))


def joined(tallies: Sequence[Tally]) -> Tally:
    """Of all numbers together."""
    if len(tallies) == 1:
        return tallies[0]
    dropped = max(one.dropped for one in tallies)
    keys, order = torch.cat([one.keys >> (dropped - one.dropped) for one in tallies]).sort()
    return _coarse(_summed(keys, torch.cat([one.counts for one in tallies])[order], dropped))


def _summed(keys: Tensor, counts: Tensor, dropped: int) -> Tally:
    """Of ``keys`` that are ascending, with the counts of equal ones added."""
    last = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=last[:-1])
    return Tally(keys[last], counts.cumsum(0)[last].diff(prepend=counts.new_zeros(1)), dropped)


def _coarse(one: Tally) -> Tally:
    keys = one.keys
    if len(keys) <= MOST:
        return one
    together = torch.frexp((keys[1:] ^ keys[:-1]).double()).exponent  # digits without which neighbours are the same
    more = int(together.kthvalue(len(together) - MOST + 1).values)
    return _summed(keys >> more, one.counts, one.dropped + more)
