"""What the frozen lower half of the language model makes of pictures and questions, worked out once for all adapters.

The adapters sit in the upper half. As turns that are packed together do not see each other, the states of a turn are
the same whatever it is packed with: one pass over everything that is asked about a picture serves every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from packing import Packed, Packer, additive, embed, through
from tasks import Item, Turn
from torch import Tensor

FIRST, BATCH = 15, 8
"""The lowest layer with adapters; pictures in a pass."""


class LowerStates:
    """States before layer :data:`FIRST` of items and their turns.

    Args:
        model: without adapters.
        packer: that turns are packed with.
        items: pictures and all that is asked about them.
        images: their tokens as the projector gives them, (items, 36, 576).
    """

    def __init__(self, model: Any, packer: Packer, items: Sequence[Item], images: Tensor) -> None:
        self.packer, self.items = packer, items
        self.prefixes: list[Tensor] = []
        self.turns: list[dict[Turn, Tensor]] = []
        for at in range(0, len(items), BATCH):
            self._add(model, [list(item.turns.values()) for item in items[at : at + BATCH]], images[at : at + BATCH])

    @torch.no_grad()
    def _add(self, model: Any, turns: list[list[Turn]], images: Tensor) -> None:
        packed, lm = self.packer(turns), model.model.language_model
        states = through(
            lm, lm.layers[:FIRST], embed(model, packed, images), packed.positions, additive(packed, model.dtype)
        )
        for row, asked in zip(states, turns, strict=True):
            at, found = len(self.packer.prefix), {}
            for turn in asked:
                length = self.packer.length(turn)
                found[turn] = row[at : at + length].clone()
                at += length
            self.prefixes.append(row[: len(self.packer.prefix)].clone())
            self.turns.append(found)

    def batch(self, task: str, rows: Sequence[int]) -> tuple[Packed, Tensor]:
        """A task's question about some pictures, and their states (rows, length, 576)."""
        asked = [[self.items[row].turns[task]] for row in rows]
        packed = self.packer(asked)
        states = self.prefixes[0].new_zeros(*packed.ids.shape, self.prefixes[0].shape[-1])
        for i, (row, turns) in enumerate(zip(rows, asked, strict=True)):
            known = torch.cat([self.prefixes[row], *(self.turns[row][turn] for turn in turns)])
            states[i, : len(known)] = known
        return packed, states
