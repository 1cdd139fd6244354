"""From a history that differs to the shortest one found that still does (delta debugging)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.differential.compare import Difference
from tests.differential.script import History, Layer, Object, Op

T = TypeVar("T")
Run = Callable[[History], Sequence[Difference]]


class Shrinker:
    """Tries smaller histories until nothing can be left out or the time is over."""

    def __init__(self, run: Run, kind: str, limit_s: float) -> None:
        self.run = run
        self.kind = kind
        self.deadline = time.monotonic() + limit_s
        self.tries = 0

    def shrink(self, history: History) -> History:
        """The smallest history found; *history* itself when it does not differ again."""
        history = self._joined(history)
        if not self._differs(history):
            return history
        for _round in range(3):
            before = history
            for phase in range(len(history.phases)):
                history = self._ops(history, phase)
            history = self._objects(history)
            if history == before:
                break
        return self._plainer(history)

    def _differs(self, history: History) -> bool:
        self.tries += 1
        return any(found.kind == self.kind for found in self.run(history))

    def _joined(self, history: History) -> History:
        """Without the swap between the phases, when it plays no part."""
        used = tuple(phase for phase in history.phases if phase) or ((),)
        joined = history._replace(phases=(tuple(op for phase in used for op in phase),))
        return joined if len(used) > 1 and self._differs(joined) else history._replace(phases=used)

    def _ops(self, history: History, phase: int) -> History:
        def with_ops(ops: Sequence[Op]) -> History:
            phases = list(history.phases)
            phases[phase] = tuple(ops)
            return history._replace(phases=tuple(phases))

        return with_ops(self._minimal(history.phases[phase], with_ops))

    def _objects(self, history: History) -> History:
        for index in range(len(history.layers)):
            history = self._layer(history, index)

        def with_upper(objects: Sequence[Object]) -> History:
            return history._replace(upper=tuple(objects))

        return with_upper(self._minimal(history.upper, with_upper))

    def _layer(self, history: History, index: int) -> History:
        def with_layer(objects: Sequence[Object]) -> History:
            layers = list(history.layers)
            layers[index] = tuple(objects)
            return history._replace(layers=tuple(layers))

        return with_layer(self._minimal(history.layers[index], with_layer))

    def _minimal(self, parts: Sequence[T], make: Callable[[Sequence[T]], History]) -> Sequence[T]:
        """Leave out runs of parts, halving the length of the runs (ddmin)."""
        length = max(1, len(parts) // 2)
        while parts:
            at = 0
            while at < len(parts):
                if time.monotonic() > self.deadline:
                    return parts
                fewer = [*parts[:at], *parts[at + length :]]
                if self._differs(make(fewer)):
                    parts = fewer
                else:
                    at += length
            if length == 1:
                break
            length //= 2
        return parts

    def _plainer(self, history: History) -> History:
        """Objects without attributes, and no layer that is empty, where that changes nothing."""
        for index, layer in enumerate(history.layers):
            for at, item in enumerate(layer):
                plain = Object(item.path, item.kind, item.mode, item.uid, item.gid, item.content)
                if plain == item or time.monotonic() > self.deadline:
                    continue
                layers = list(history.layers)
                layers[index] = (
                    *history.layers[index][:at],
                    plain,
                    *history.layers[index][at + 1 :],
                )
                simpler = history._replace(layers=tuple(layers))
                history = simpler if self._differs(simpler) else history
        used: tuple[Layer, ...] = tuple(layer for layer in history.layers if layer)
        fewer = history._replace(layers=used or history.layers[:1])
        return fewer if fewer != history and self._differs(fewer) else history
