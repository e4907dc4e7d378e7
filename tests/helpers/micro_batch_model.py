"""`accumulate` of plain sums in NumPy and sets, one gradient at a time; shares no code with it."""

import numpy as np

ACCEPTED, STALE, OVERFLOW, INVALID, SKIPPED = range(5)


class MicroBatchModel:
    """Tables of one number a row, from which the sums of gradients are subtracted at each step.

    A gradient that is ``s`` steps old weighs ``2**-s``. They come as ``{table: (ids, values)}``; an
    id that is the table's row count is padding.
    """

    def __init__(self, rows, capacity, num_required, on_overflow="step", max_staleness=0):
        self.rows, self.capacity = rows, capacity
        self.num_required, self.on_overflow = num_required, on_overflow
        self.max_staleness, self.ages = max_staleness, [0] * (max_staleness + 2)
        self.params = {name: np.zeros(count) for name, count in rows.items()}
        self.step = self.num_early = 0
        self.verdicts = [0] * 5
        self.peak = dict.fromkeys(rows, 0)
        self._empty()

    def _empty(self):
        self.held = []

    def _rows_held(self, name, more=()):
        ids = [i for grad in [*self.held, *more] for i in grad[name][0]]
        return set(ids) - {self.rows[name]}

    def _take_step(self):
        for grad in self.held:
            for name, (ids, values) in grad.items():
                for i, value in zip(ids, values, strict=True):
                    if i != self.rows[name]:
                        self.params[name][i] -= value
        self.step += 1
        self._empty()

    def _verdict(self, grad, local_step):
        if local_step < self.step - self.max_staleness:
            return STALE
        for name, (ids, _) in grad.items():
            if any(not 0 <= i <= self.rows[name] for i in ids):
                return INVALID
        for name, (ids, values) in grad.items():
            if not np.isfinite(values[ids != self.rows[name]]).all():
                return SKIPPED
        needed = {name: len(self._rows_held(name, [grad])) for name in grad}
        self.peak = {name: max(self.peak[name], n) for name, n in needed.items()}
        fits = all(n <= self.capacity for n in needed.values())
        return ACCEPTED if fits else OVERFLOW

    def add(self, grad, local_step):
        verdict = self._verdict(grad, local_step)
        age = min(max(self.step - local_step, 0), self.max_staleness + 1)
        if verdict in (ACCEPTED, STALE, OVERFLOW):
            self.ages[age] += verdict != OVERFLOW or self.on_overflow == "step"
        grad = {name: (ids, values * 2.0**-age) for name, (ids, values) in grad.items()}
        if verdict == OVERFLOW and self.on_overflow == "step":
            self._take_step()
            self.num_early += 1
            self.held.append(grad)
            verdict = ACCEPTED
        else:
            if verdict == ACCEPTED:
                self.held.append(grad)
            if len(self.held) >= self.num_required(self.step):
                self._take_step()
        self.verdicts[verdict] += 1
        return verdict
