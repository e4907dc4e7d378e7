"""TensorFlow's own traces, bit for bit."""

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum

CAPACITY = 16  # one for all traces: fewer programs to compile


def padded(indices, values):
    """A gradient of 8 slices: more than any in the traces, so sizes share a compilation."""
    extra = max(8 - len(indices), 0)
    return jaxaccum.IndexedSlices(
        np.concatenate([indices, np.full(extra, 2**31 - 1)]),
        np.concatenate([values, np.full((extra, *values.shape[1:]), 9, values.dtype)]),
        None,
    )


def bits(values):
    """All bits, but for the sign and payload of NaN, which JSON does not carry."""
    values = np.array(values)
    values[np.isnan(values)] = np.nan
    return values.tobytes()


class Replay:
    """Plays a trace. TensorFlow fixes the shape of a row with the first gradient after a take."""

    def __init__(self, case):
        self.shape, self.dtype = case["shape"] or [None], case["dtype"]
        self.reduction = {"MEAN": "mean_per_row", "SUM": "sum"}[case["reduction_type"]]
        self.step, self.state = 0, None

    def fresh(self, row):
        return jaxaccum.init(
            (self.shape[0], *row),
            self.dtype,
            capacity=CAPACITY,
            reduction=self.reduction,
            accumulator_dtype=self.dtype,
            global_step=self.step,
        )

    def apply(self, op):
        indices, values = golden_data.array(op["indices"]), golden_data.array(op["values"])
        if "error" in op["expect"]:
            return self.refuse(op, indices, values)
        state = self.fresh(values.shape[1:]) if self.state is None else self.state
        is_stale = not op["expect"]["applied"]
        if is_stale:  # TensorFlow drops stale gradients unseen, malformed ones too
            indices, values = np.zeros(1, np.int64), np.zeros((1, *state.values.shape[1:]))
        after, verdict = jaxaccum.apply(
            state, padded(indices, values.astype(self.dtype)), op["local_step"]
        )
        assert verdict == (jaxaccum.Verdict.STALE if is_stale else jaxaccum.Verdict.ACCEPTED)
        self.state = after if self.state is not None or not is_stale else None

    def refuse(self, op, indices, values):
        row = tuple(d or 1 for d in self.shape[1:]) or values.shape[1:]
        state = self.fresh(row) if self.state is None else self.state
        before = jax.tree.map(np.asarray, state)
        try:
            grad = jaxaccum.IndexedSlices(indices, values, op["grad_shape"])
            after, verdict = jaxaccum.apply(state, grad, op["local_step"])
        except (TypeError, ValueError):
            return
        assert verdict == jaxaccum.Verdict.INVALID, op["expect"]["message"]
        np.testing.assert_array_equal(after.indices, before.indices)
        self.state = None if self.state is None else after

    def take(self, op):
        expect = op["expect"]
        if "error" in expect:
            with pytest.raises(ValueError, match=f"must be positive, got {op['num_required']}"):
                jaxaccum.take(self.fresh(()), op["num_required"])
            return
        if "blocks" in expect:
            if self.state is not None:
                _, _, ready = jaxaccum.take(self.state, op["num_required"])
                assert not ready
            else:
                assert op["num_accumulated"] == 0
            return
        assert self.state is not None
        state, grad, ready = jaxaccum.take(self.state, op["num_required"])
        assert ready
        count = int(np.sum(np.asarray(grad.row_mask)))
        want = golden_data.array(expect["values"])
        np.testing.assert_array_equal(grad.indices[:count], golden_data.array(expect["indices"]))
        assert grad.values.dtype == want.dtype
        assert bits(grad.values[:count]) == bits(want)
        assert int(state.global_step) == expect["global_step_after"]
        self.step, self.state = int(state.global_step), None

    def set_global_step(self, op):
        self.step = op["new_global_step"]
        if self.state is not None:
            self.state = jaxaccum.set_step(self.state, self.step)

    def held(self):
        return 0 if self.state is None else int(self.state.num_accumulated)

    def num_accumulated(self, op):
        assert self.held() == op["expect"]

    def play(self, ops):
        for op in ops:
            getattr(self, op["op"])(op)
            assert self.held() == op.get("num_accumulated", self.held())


@pytest.mark.parametrize("case", golden_data.some_cases("accumulator.json", 4))
def test_trace_equals_tensorflow_bit_for_bit(case):
    Replay(case).play(case["ops"])


@pytest.mark.parametrize("case", golden_data.some_cases("accumulator_wild.json", 2))
def test_wild_trace_equals_dense_arithmetic(case):
    """TensorFlow mistreats unsorted and repeated rows; ours mean their sum, once a gradient."""
    rows = 64
    replay = Replay({**case, "shape": [None]})
    sums, touched = {}, {}
    for op in case["ops"]:
        if op["op"] == "take":
            _, grad, ready = jaxaccum.take(replay.state, op["num_required"])
            assert ready
            count = len(sums)
            assert grad.indices[:count].tolist() == sorted(sums)
            assert not grad.row_mask[count:].any()
            for row, value in zip(sorted(sums), np.asarray(grad.values), strict=False):
                divisor = touched[row] if case["reduction_type"] == "MEAN" else 1
                eps = float(jnp.finfo(case["dtype"]).eps)
                np.testing.assert_allclose(
                    value.astype(np.float64), sums[row] / divisor, rtol=8 * eps, atol=8 * eps
                )
            replay.state = None
            sums, touched = {}, {}
            continue
        indices = golden_data.array(op["indices"]) % rows  # negative rows are INVALID: see below
        values = golden_data.array(op["values"])
        state = replay.fresh(values.shape[1:]) if replay.state is None else replay.state
        replay.state, verdict = jaxaccum.apply(state, padded(indices, values))
        assert verdict == jaxaccum.Verdict.ACCEPTED
        for row, value in zip(indices.tolist(), values.astype(np.float64), strict=True):
            sums[row] = sums.get(row, 0) + value
        for row in set(indices.tolist()):
            touched[row] = touched.get(row, 0) + 1
        if (golden_data.array(op["indices"]) < 0).any():
            _, verdict = jaxaccum.apply(state, padded(golden_data.array(op["indices"]), values))
            assert verdict == jaxaccum.Verdict.INVALID
