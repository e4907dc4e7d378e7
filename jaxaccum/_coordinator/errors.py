"""What the host coordinator raises: TensorFlow's errors, each also a built-in one."""

from __future__ import annotations

from jaxaccum._rows.public import public


@public
class InvalidArgumentError(ValueError):
    """An argument does not fit the accumulator; nothing has changed.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32", shape=(3, 2))
      >>> acc.apply_grad([3], [[1.0, 2.0]])
      Traceback (most recent call last):
      jaxaccum.InvalidArgumentError: Shape mismatch: index of slice 0 exceeded limits of \
shape; index is 3 exceeded 3

    Source: TensorFlow's ``tf.errors.InvalidArgumentError``, which is no ``ValueError``.
    """


@public
class CancelledError(RuntimeError):
    """The accumulator was closed, before the call or while it waited.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32", name="rows")
      >>> acc.close()
      >>> acc.num_accumulated()
      Traceback (most recent call last):
      jaxaccum.CancelledError: Attempted to use a closed accumulator: rows

    Source: TensorFlow's ``tf.errors.CancelledError``; no relation of asyncio's.
    """


@public
class DeadlineExceededError(TimeoutError):
    """A take waited for ``timeout`` seconds; it has taken nothing and left the queue.

    Example:
      >>> import jaxaccum
      >>> acc = jaxaccum.SparseConditionalAccumulator("float32")
      >>> acc.take_grad(1, timeout=0)
      Traceback (most recent call last):
      jaxaccum.DeadlineExceededError: Timed out waiting for notification

    Source: TensorFlow's ``tf.errors.DeadlineExceededError``.
    """
