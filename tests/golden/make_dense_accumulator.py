"""Writes ``dense_accumulator.json``: traces of TensorFlow's ``ConditionalAccumulator``.

    python tests/golden/make_dense_accumulator.py      # where tensorflow is installed

Gradients are fed through placeholders of unknown shape, so that the kernel judges them, not the
graph. A take that would block is not run; the trace says so.
"""

import json
import pathlib

import numpy as np

UNKNOWN = "unknown"  # a shape of which not even the rank is known


def array(arr):
    """An array as the other golden files have it: exact doubles, "nan", "inf" and "-inf"."""

    def plain(x):
        if isinstance(x, list):
            return [plain(each) for each in x]
        return x if np.isfinite(x) else str(x)

    arr = np.asarray(arr)
    data = plain(arr.astype(np.float64).tolist())
    return {"dtype": arr.dtype.name, "shape": list(arr.shape), "data": data}


class Trace:
    """One accumulator in a session of its own, and what it was asked and said."""

    def __init__(self, tf, name, dtype="float32", shape=(2, 3), reduction_type="MEAN"):
        self.tf, self.tf1, self.dtype = tf, tf.compat.v1, dtype
        self.step, self.ops = 0, []
        self.case = {
            "name": name,
            "dtype": dtype,
            "shape": UNKNOWN if shape == UNKNOWN else list(shape),
            "reduction_type": reduction_type,
            "ops": self.ops,
        }
        self.graph = tf.Graph()
        with self.graph.as_default():
            of_tf = tf.TensorShape(None) if shape == UNKNOWN else tf.TensorShape(shape)
            self.acc = self.tf1.ConditionalAccumulator(
                dtype, shape=of_tf, reduction_type=reduction_type
            )
            self.fed = self.tf1.placeholder(dtype)
            self.number = self.tf1.placeholder(tf.int64, [])
            self.required = self.tf1.placeholder(tf.int32, [])
            self.do_apply = self.acc.apply_grad(self.fed, local_step=self.number)
            self.do_take = self.acc.take_grad(self.required)
            self.do_set = self.acc.set_global_step(self.number)
            self.do_count = self.acc.num_accumulated()
            self.session = self.tf1.Session()

    def count(self):
        return int(self.session.run(self.do_count))

    def run(self, op, expect):
        try:
            expect = expect()
        except self.tf.errors.InvalidArgumentError as error:
            # The kernel's own line, before the node it comes from.
            message = error.message.split("\n\t [[")[0].rsplit("\n", 1)[-1]
            expect = {"error": "InvalidArgumentError", "message": message}
        self.ops.append(op | {"expect": expect, "num_accumulated": self.count()})
        return self

    def apply(self, grad, local_step=None):
        grad = np.asarray(grad, self.dtype)
        local_step = self.step if local_step is None else local_step
        before = self.count()

        def expect():
            self.session.run(self.do_apply, {self.fed: grad, self.number: local_step})
            return {"applied": self.count() > before}

        return self.run({"op": "apply", "grad": array(grad), "local_step": local_step}, expect)

    def take(self, num_required=1):
        def expect():
            if num_required > 0 and self.count() < num_required:
                return {"blocks": True}
            mean = self.session.run(self.do_take, {self.required: num_required})
            self.step += 1
            return array(mean)

        return self.run({"op": "take", "num_required": num_required}, expect)

    def set_global_step(self, step):
        def expect():
            self.session.run(self.do_set, {self.number: step})
            self.step = step

        return self.run({"op": "set_global_step", "new_global_step": step}, expect)


def by_hand(trace):
    """What each thing does, one at a time."""
    ones = np.ones((2, 3))
    yield trace("mean").apply(ones).apply(2 * ones).apply(4 * ones).take(2).take(1)
    yield trace("sum", reduction_type="SUM").apply(ones).apply(2 * ones).take(2)
    yield (
        trace("stale-and-future")
        .apply(ones, 5)
        .take(1)
        .apply(ones, 0)
        .apply(3 * ones, 1)
        .set_global_step(4)
        .apply(ones, 3)
        .apply(5 * ones, 4)
        .set_global_step(2)
        .apply(7 * ones, 2)
        .take(3)
        .apply(ones, 2)
        .apply(ones, 3)
        .take(1)
    )
    yield trace("needs-more").take(1).apply(ones).take(2).apply(ones).take(2)
    yield trace("bad-num-required").apply(ones).take(0).take(-3).take(1)
    yield (
        trace("other-shapes")
        .apply(np.ones((3, 2)))
        .apply(np.ones(3))
        .apply(1.0)
        .apply(np.ones((2, 3, 1)))
        .apply(ones)
        .apply(np.ones((3, 2)))
        .apply(np.ones((3, 2)), -1)
        .take(1)
    )
    yield (
        trace("partly-known", shape=(None, 3))
        .apply(np.ones((2, 4)))
        .apply(ones)
        .apply(np.ones((4, 3)))
        .apply(np.ones((2, 4)))
        .apply(np.ones(3))
        .take(1)
        .apply(np.ones((4, 3)))
        .take(1)
    )
    yield (
        trace("unknown-rank", shape=UNKNOWN)
        .apply(2.0)
        .apply(np.ones(1))
        .take(1)
        .apply(np.ones((1, 1)))
        .apply(1.0)
        .apply(np.ones((1, 1)))
        .take(2)
    )
    yield trace("scalar", shape=()).apply(1.0).apply(2.0).apply(np.ones(1)).take(2)
    yield trace("empty", shape=(0, 3)).apply(np.ones((0, 3))).apply(np.ones((1, 3))).take(1)
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e30, 0.1])
    yield trace("not-finite", shape=(6,)).apply(odd).apply(odd[::-1]).take(2)
    yield trace("alone", shape=(6,)).apply(odd).take(1)


def drawn(trace):
    """Random traces: quotients that round, in every dtype there is a kernel for."""
    for dtype in ("float16", "float32", "float64"):
        for k in range(4):
            rng = np.random.default_rng(k)
            shape, reduction = ((5,), (2, 3), (), (1, 7))[k], ("MEAN", "SUM")[k % 3 == 2]
            t = trace(f"random-{dtype}-{k}", dtype, shape, reduction)
            for _ in range(24):
                if rng.random() < 0.7:
                    t.apply(rng.standard_normal(shape) * 3, t.step + int(rng.integers(-1, 2)))
                else:
                    t.take(int(rng.integers(1, 4)))
            yield t


def main():
    import tensorflow as tf

    def trace(*args, **options):
        return Trace(tf, *args, **options)

    cases = [json.dumps(t.case) for t in (*by_hand(trace), *drawn(trace))]
    text = f'{{"format": 1, "tf_version": "{tf.__version__}", "cases": [\n'
    path = pathlib.Path(__file__).parent / "dense_accumulator.json"
    path.write_text(text + ",\n".join(cases) + "\n]}\n")
    print(path, len(cases))


if __name__ == "__main__":
    main()
