"""Answers to pushes, kept so that one that is repeated is counted once."""

from __future__ import annotations

import collections

from jaxaccum._accumulator.state import Verdict

# A push is repeated within its time-out: a server that takes two thousand a second still knows
# the answer after half a minute. At 150 bytes each these are 10 MB.
_LIMIT = 1 << 16


class Answers:
    """The latest answers by the key of the push, oldest first."""

    def __init__(self, saved: dict[str, Verdict] | None = None) -> None:
        self._by_key = collections.OrderedDict(saved or {})

    def find(self, key: str) -> Verdict | None:
        """Returns what was answered to this push before."""
        return self._by_key.get(key)

    def keep(self, key: str, answer: Verdict) -> Verdict:
        """Remembers an answer, and returns it."""
        self._by_key[key] = answer
        if len(self._by_key) > _LIMIT:
            self._by_key.popitem(last=False)
        return answer

    def save(self) -> dict[str, Verdict]:
        """Returns all of it."""
        return dict(self._by_key)
