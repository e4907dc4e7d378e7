"""What `TreeAccumulator` promises, in NumPy: every gradient kept, every take added up anew.

A gradient is a dict by leaf: ids and rows of a table, or the array of a dense leaf. Shares no code
with the package.
"""

import numpy as np

import jaxaccum

# Two tables and two dense leaves; the shape of a table's gradient begins with its rows.
SHAPES = {"bias": (3,), "items": (7, 2), "scale": (), "words": (None, 4)}
TABLES = {"bias": False, "items": True, "scale": False, "words": True}


class Oracle:
    """One accumulator, asked one thing at a time."""

    def __init__(
        self,
        reduction="mean_per_gradient",
        max_staleness=0,
        staleness_weight=None,
        exactly=False,
        carry_over=False,
    ):
        self.reduction, self.max_staleness = reduction, max_staleness
        self.weight = staleness_weight or (lambda staleness: 1.0)
        self.exactly, self.carry_over = exactly, carry_over
        self.step, self.held = 0, []
        self.ages, self.num_stale = {}, 0

    def apply(self, gradient, local_step):
        """Whether it is accepted."""
        staleness = max(self.step - local_step, 0)
        self.ages[staleness] = self.ages.get(staleness, 0) + 1
        if staleness > self.max_staleness and not self.carry_over:
            self.num_stale += 1
            return False
        self.held.append((gradient, staleness))
        return True

    @property
    def num_accumulated(self):
        return sum(staleness <= self.max_staleness for _, staleness in self.held)

    def take(self, num_required):
        """Means by leaf: a dict of rows for a table."""
        if self.num_accumulated < num_required:
            return None
        end = len(self.held)
        if self.exactly:
            counted = [i for i, (_, age) in enumerate(self.held) if age <= self.max_staleness]
            end = counted[num_required - 1] + 1
        used, self.held = self.held[:end], self.held[end:]
        self.step += 1
        pairs = [(gradient, float(self.weight(age))) for gradient, age in used]
        total = sum(weight for _, weight in pairs)
        return {name: self._mean(name, pairs, total) for name in SHAPES}

    def _mean(self, name, pairs, total):
        divisor = 1.0 if self.reduction == "sum" else total
        if not TABLES[name]:
            return sum(np.float64(gradient[name]) * weight for gradient, weight in pairs) / divisor
        sums, touched = {}, {}
        for gradient, weight in pairs:
            ids, rows = gradient[name]
            for i, row in zip(ids.tolist(), rows.astype(np.float64), strict=True):
                sums[i] = sums.get(i, 0) + weight * row
            for i in set(ids.tolist()):
                touched[i] = touched.get(i, 0) + weight
        if self.reduction == "mean_per_row":
            return {i: sums[i] / touched[i] for i in sorted(sums)}
        return {i: sums[i] / divisor for i in sorted(sums)}


def draw_gradient(rng, most=6):
    """A random gradient: few rows, and those repeated."""

    def rows(name, high):
        n = int(rng.integers(0, most))
        values = rng.integers(-8, 8, (n, SHAPES[name][1])).astype(np.float32)
        return rng.integers(0, high, n), values

    return {
        "bias": rng.integers(-8, 8, 3).astype(np.float32),
        "items": rows("items", 7),
        "scale": np.float32(rng.integers(-8, 8)),
        "words": rows("words", 20),
    }


def as_grads(gradient):
    """The gradient as `value_and_sparse_grad` returns it."""
    return {
        name: jaxaccum.IndexedSlices(*leaf, SHAPES[name]) if TABLES[name] else leaf
        for name, leaf in gradient.items()
    }


def like():
    """What an accumulator of such gradients is made like."""
    return {
        name: jaxaccum.IndexedSlices(
            np.zeros(0, np.int32), np.zeros((0, *shape[1:]), np.float32), shape
        )
        if TABLES[name]
        else np.zeros(shape, np.float32)
        for name, shape in SHAPES.items()
    }


def assert_same(taken, expected, rtol=2e-7):
    """A tree that was taken is what the oracle says."""
    for name, mean in expected.items():
        if not TABLES[name]:
            np.testing.assert_allclose(taken[name], mean, rtol=rtol)
            continue
        mask = np.asarray(taken[name].row_mask)
        assert np.asarray(taken[name].indices)[mask].tolist() == list(mean)
        rows = np.array(list(mean.values())).reshape(-1, SHAPES[name][1])
        np.testing.assert_allclose(np.asarray(taken[name].values)[mask], rows, rtol=rtol)
        assert taken[name].dense_shape == SHAPES[name]
