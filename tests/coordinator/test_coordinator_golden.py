"""TensorFlow's own traces and schedules through `SparseConditionalAccumulator`, bit for bit."""

import golden_data
import numpy as np
import pytest
import takers

import jaxaccum

ERRORS = {
    "InvalidArgumentError": jaxaccum.InvalidArgumentError,
    "CancelledError": jaxaccum.CancelledError,
}


def named(case):
    return case["name"]


def assert_same(grad, expect):
    """Bit for bit; the index dtype alone is narrower than TensorFlow's."""
    np.testing.assert_array_equal(grad.indices, golden_data.array(expect["indices"]))
    values, ours = golden_data.array(expect["values"]), np.array(grad.values)
    assert ours.dtype == values.dtype
    ours[np.isnan(ours)] = np.nan  # JSON carries no sign of NaN
    assert ours.tobytes() == values.tobytes()


def apply(acc, op):
    return acc.apply_grad(
        golden_data.array(op["indices"]),
        golden_data.array(op["values"]),
        op["grad_shape"],
        op["local_step"],
    )


def take(acc, op):
    if "blocks" in op["expect"]:
        with pytest.raises(jaxaccum.DeadlineExceededError):
            acc.take_grad(op["num_required"], timeout=0)
        return
    grad = acc.take_grad(op["num_required"])
    assert_same(grad, op["expect"])
    np.testing.assert_array_equal(grad.shape, golden_data.array(op["expect"]["shape"]))
    assert acc.statistics()["global_step"] == op["expect"]["global_step_after"]


PLAY = {
    "apply": lambda acc, op: apply(acc, op) == op["expect"]["applied"],
    "take": lambda acc, op: take(acc, op) is None,
    "set_global_step": lambda acc, op: acc.set_global_step(op["new_global_step"]) is None,
    "num_accumulated": lambda acc, op: acc.num_accumulated() == op["expect"],
}


def play(acc, op):
    expect = op.get("expect")
    if isinstance(expect, dict) and "error" in expect:
        before = acc.state_dict()
        with pytest.raises(ERRORS[expect["error"]]) as raised:
            PLAY[op["op"]](acc, {**op, "expect": {"applied": None}})
        assert str(raised.value) == expect["message"]
        for name, array in acc.state_dict().items():
            np.testing.assert_array_equal(array, before[name])
    else:
        assert PLAY[op["op"]](acc, op)
    assert acc.num_accumulated() == op.get("num_accumulated", acc.num_accumulated())


def some(cases):
    """Most that have a name of their own, and some of the random ones; the others with --full."""
    for case in cases:
        name = case["name"]
        costly = (
            "doc-sum",
            "mean-is-per-row-float32",
            "partial-shape-2-2-none",
            "tail-shape-pinned-until-take",
        )
        is_more = name in costly or (name.startswith("random") and not name.endswith("00"))
        marks = [pytest.mark.full] if is_more else []
        yield pytest.param(case, marks=marks, id=case["name"])


@pytest.mark.parametrize("case", list(some(golden_data.cases("accumulator.json"))))
def test_traces(case):
    acc = jaxaccum.SparseConditionalAccumulator(
        case["dtype"],
        case["shape"],
        reduction_type=case["reduction_type"],
        capacity=16,
        accumulator_dtype=case["dtype"],
    )
    for op in case["ops"]:
        play(acc, op)


class Schedule:
    """Plays a schedule of waiting takers, each in a thread of its own."""

    def __init__(self, acc, watch):
        self.acc, self.watch, self.takers = acc, watch, {}

    def start_take(self, event):
        self.takers[event["taker"]] = self.watch.take(self.acc, event["num_required"])

    def apply(self, event):
        self.acc.apply_grad(
            np.array(event["indices"]),
            np.array(event["values"], np.float32),
            local_step=event["local_step"],
        )

    def set_global_step(self, event):
        self.acc.set_global_step(event["new_global_step"])

    def cancel(self, event):
        self.watch.expire(self.takers[event["taker"]])
        with pytest.raises(jaxaccum.DeadlineExceededError):
            self.takers[event["taker"]].result()

    def close(self, event):
        self.acc.close()
        for taker in event["cancelled"]:
            with pytest.raises(ERRORS[event["error"]], match=event["message"]):
                self.takers[taker].result()

    def play(self, event):
        getattr(self, event["op"])(event)
        for done in event.get("finished", []):
            assert_same(self.takers[done["taker"]].result(), done)
        if event["op"] != "close":
            expected = [self.takers[i].waiter for i in event["waiting"]]
            assert takers.waiting(self.acc) == expected
            assert self.acc.num_accumulated() == event["num_accumulated"]


@pytest.mark.parametrize("case", golden_data.cases("blocking.json"), ids=named)
def test_schedules(case, monkeypatch):
    acc = jaxaccum.SparseConditionalAccumulator(
        case["dtype"], case["shape"], reduction_type=case["reduction_type"], capacity=16
    )
    schedule = Schedule(acc, takers.Watch(monkeypatch))
    for event in case["events"]:
        schedule.play(event)
    acc.close()
    for taker in schedule.takers.values():
        taker.join(takers.PATIENCE)
        assert not taker.is_alive()
