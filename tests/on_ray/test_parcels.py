"""What travels in a call: cut, put together again, and left to Ray's store where it is large."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxaccum[ray]'")

from internals import pack, unpack

import jaxaccum

RAYS_LIMIT = 100 * 1024  # of an argument that travels in the call


def check_round_trip(tree):
    parcel = pack(tree)
    back = unpack(parcel)
    assert back.keys() == tree.keys()
    for name, array in tree.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array, err_msg=name)
        assert not np.shares_memory(back[name], array)
    return parcel, back


@pytest.mark.parametrize("num", [0, 1, 24_559, 24_576, 24_577, 49_152, 200_000])
def test_arrays_come_back_from_any_number_of_chunks(num):
    rng = np.random.default_rng(num)
    parcel, back = check_round_trip(
        {"ids": rng.integers(0, 9, 7).astype(np.int16), "values": rng.random(num, np.float32)}
    )
    assert all(type(each) is bytes and len(each) < RAYS_LIMIT for each in parcel)
    assert len(parcel) == 2 + (64 + 4 * num - 1) // (96 * 1024)
    assert all(array.ctypes.data % 64 == 0 for array in back.values() if array.size)


def test_arrays_of_any_kind_come_back():
    rng = np.random.default_rng(0)
    check_round_trip(
        {
            "nothing": np.zeros((0, 3), np.float32),
            "number": np.array(3.5, np.float64),
            "narrow": rng.random((5, 3)).astype(ml_dtypes.bfloat16),
            "columns": np.asfortranarray(rng.random((40, 300))),
            "strided": rng.random((300, 400))[::3, ::2],
            "backwards": rng.integers(0, 2**40, 100)[::-1],
            "flags": rng.random(100) < 0.5,
        }
    )


def test_a_gradient_keeps_its_class_and_what_is_beside_it():
    ids, values = np.array([3, 1], np.int32), np.ones((2, 60_000), np.float32)
    grad = jaxaccum.IndexedSlices(ids, values, (9, 60_000))
    key, back, step, worker = unpack(pack(("key", grad, 5, None)))
    assert (key, step, worker) == ("key", 5, None)
    assert isinstance(back, jaxaccum.IndexedSlices)
    assert back.dense_shape == (9, 60_000)
    np.testing.assert_array_equal(back.indices, ids)
    np.testing.assert_array_equal(back.values, values)


def test_what_is_large_is_left_to_rays_store():
    tree = {"values": np.zeros(5 << 18, np.uint8)}
    assert len(pack(tree)) == 15  # 13.3 chunks, and what is in them
    tree["more"] = np.zeros(1, np.uint8)
    assert pack(tree) == [tree]
    assert unpack([tree]) is tree
