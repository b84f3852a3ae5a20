"""An executor without other processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any


class Posted:
    """An executor that does the work here, with all that goes there and back as bytes; twice, as after a crash."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def run(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        cost: Callable[[Any], float],
        load: Callable[[Any], Any],
    ) -> Generator[Any, None, None]:
        made = pickle.dumps(function)
        for item in items:
            assert cost(item) > 0
            letter = pickle.dumps(load(item))
            self.sent.append(len(letter))
            pickle.loads(made)(pickle.loads(letter))
            yield pickle.loads(pickle.dumps(pickle.loads(made)(pickle.loads(letter))))
