"""Which pair comes next, so that few models need to be prepared twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from clafusion.batch.results import Pair

__all__ = ["Scheduler", "split_into_tasks"]

_PAIRS_A_TASK = 4
_LAST_PAIRS = 8  # each is a task of its own, so that all workers end at about the same time
_MODELS_AT_HAND = 8  # for this many models in a worker the tasks are ordered


class Scheduler:
    """Chooses the next pair.

    Attributes
    ----------
    left
        The pairs that are not done, in the order in which they were given.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.left = dict.fromkeys(pairs)
        self._by_model: dict[str, dict[Pair, None]] = {}
        for pair in self.left:
            for name in pair:
                self._by_model.setdefault(name, {})[pair] = None

    def next(self, at_hand: Iterable[str]) -> Pair:
        """Return a pair of models at hand, else one that brings in the most useful model.

        ``at_hand`` are the models that are prepared, the oldest first.
        """
        names = dict.fromkeys(at_hand)
        for name in names:
            for pair in self._by_model.get(name, ()):
                if pair[0] in names and pair[1] in names:
                    return pair
        for name in names:  # the oldest has met the most others
            others = {
                pair[0] if pair[1] == name else pair[1]: pair
                for pair in self._by_model.get(name, ())
            }
            if others:
                best = max(others, key=lambda other: self._num_meetings(other, names))
                return others[best]
        return next(iter(self.left))

    def _num_meetings(self, name: str, at_hand: Mapping[str, None]) -> int:
        return sum(one in at_hand or other in at_hand for one, other in self._by_model[name])

    def done(self, pair: Pair) -> list[str]:
        """Strike out a pair; return the models that no pair needs any more."""
        del self.left[pair]
        for name in pair:
            self._by_model[name].pop(pair, None)
        return [name for name in pair if not self._by_model[name]]


def split_into_tasks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Split pairs into tasks. Few models occur in a task and the next ones."""
    scheduler = Scheduler(pairs)
    at_hand: OrderedDict[str, None] = OrderedDict()
    order: list[Pair] = []
    while scheduler.left:
        pair = scheduler.next(at_hand)
        for name in pair:
            if name not in at_hand and len(at_hand) >= _MODELS_AT_HAND:
                del at_hand[next(one for one in reversed(at_hand) if one not in pair)]
            at_hand[name] = None
        order.append(pair)
        for name in scheduler.done(pair):
            at_hand.pop(name, None)
    early = order[:-_LAST_PAIRS]
    return [
        *(early[i : i + _PAIRS_A_TASK] for i in range(0, len(early), _PAIRS_A_TASK)),
        *([pair] for pair in order[-_LAST_PAIRS:]),
    ]
