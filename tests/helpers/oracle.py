"""An accumulator in NumPy and dicts, one slice at a time. Shares no code with the package."""

import numpy as np

ACCEPTED, STALE, OVERFLOW, INVALID = range(4)  # and SKIPPED, which only optimizers know


class Oracle:
    """What `jaxaccum` promises, said as slowly and plainly as possible.

    ``weights`` says what a gradient weighs by how many steps old it is; older ones are stale.
    """

    def __init__(
        self,
        rows,
        capacity,
        reduction="mean_per_row",
        dtype=np.float32,
        sum_dtype=None,
        weights=(1,),
    ):
        self.rows, self.capacity, self.reduction = rows, capacity, reduction
        self.weights, self.ages = weights, [0] * (len(weights) + 1)
        self.dtype, self.sum_dtype = dtype, sum_dtype or dtype
        self.step = 0
        self.verdicts = [0, 0, 0, 0, 0]
        self._start_afresh()

    def _start_afresh(self):
        self.sums, self.touched, self.num_accumulated, self.total = {}, {}, 0, 0

    def apply(self, ids, values, local_step=None, padding=None):
        age = 0 if local_step is None else self.step - local_step
        age = min(max(age, 0), len(self.weights))
        verdict = self._try_apply(ids, values, age, padding)
        self.verdicts[verdict] += 1
        self.ages[age] += verdict in (ACCEPTED, STALE)
        return verdict

    def _try_apply(self, ids, values, age, padding):
        if age == len(self.weights):
            return STALE
        if padding is None:
            padding = 2**31 - 1 if self.rows is None else self.rows
        last = min(padding, 2**31 - 1 if self.rows is None else self.rows)
        real = [(int(i), v) for i, v in zip(ids, values, strict=True) if i != padding]
        if any(not 0 <= i < last for i, _ in real):
            return INVALID
        if len(self.sums.keys() | {i for i, _ in real}) > self.capacity:
            return OVERFLOW
        weight = self.weights[age]
        for row, value in real:
            value = value.astype(self.sum_dtype) * np.array(weight).astype(self.sum_dtype)
            self.sums[row] = (self.sums[row] + value) if row in self.sums else value
        for row in {i for i, _ in real}:
            self.touched[row] = self.touched.get(row, 0) + weight
        self.num_accumulated += 1
        self.total += weight
        return ACCEPTED

    def take(self, num_required=1):
        if self.num_accumulated < num_required:
            return None
        order = sorted(self.sums)
        values = [self._reduce(self.sums[row], self.touched[row]) for row in order]
        self._start_afresh()
        self.step += 1
        return order, values

    def _reduce(self, total, touched):
        if self.reduction == "sum":
            return total.astype(self.dtype)
        count = touched if self.reduction == "mean_per_row" else self.total
        if np.issubdtype(self.sum_dtype, np.integer):
            # In Python's integers: 64 bits do not fit a float.
            exact = [abs(int(t)) // count * (1 if t >= 0 else -1) for t in total.ravel()]
            return np.array(exact, object).reshape(total.shape).astype(self.dtype)
        return (total / np.asarray(count).astype(self.sum_dtype)).astype(self.dtype)

    def merge(self, other):
        if len(self.sums.keys() | other.sums.keys()) > self.capacity:
            self.verdicts[OVERFLOW] += 1
            return OVERFLOW
        for row, total in other.sums.items():
            self.sums[row] = (self.sums[row] + total) if row in self.sums else total
            self.touched[row] = self.touched.get(row, 0) + other.touched[row]
        self.num_accumulated += other.num_accumulated
        self.total += other.total
        self.ages = [a + b for a, b in zip(self.ages, other.ages, strict=True)]
        self.step = max(self.step, other.step)
        self.verdicts = [a + b for a, b in zip(self.verdicts, other.verdicts, strict=True)]
        return ACCEPTED
