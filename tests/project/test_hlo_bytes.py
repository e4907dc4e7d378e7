"""The counter of bytes, on a program small enough to count by hand."""

import hlo_bytes

PROGRAM = {
    "fused_update": [
        "%rows = f32[1000,4]{1,0} parameter(0)",
        "%ids = s32[8]{0} parameter(1)",
        "%flat = s32[8,1]{1,0} bitcast(%ids)",
        "%found = f32[8,1,4]{2,1,0} gather(%rows, %flat), slice_sizes={1,4}",
        "%grads = bf16[8,1,4]{2,1,0} parameter(2)",
        "%wide = f32[8,1,4]{2,1,0} convert(%grads)",
        "ROOT %sum = f32[8,1,4]{2,1,0} add(%found, %wide)",
    ],
    "fused_write": [
        "%table = f32[1000,4]{1,0} parameter(0)",
        "%where = s32[8,1]{1,0} parameter(1)",
        "%new = f32[8,1,4]{2,1,0} parameter(2)",
        "ROOT %scatter.1 = f32[1000,4]{1,0} scatter(%table, %where, %new), to_apply=%second",
    ],
    "fused_add": [
        "%sums = f32[1000,4]{1,0} parameter(0)",
        "%at = s32[8,1]{1,0} parameter(1)",
        "%more = f32[8,1,4]{2,1,0} parameter(2)",
        "%scatter-add.1 = f32[1000,4]{1,0} scatter(%sums, %at, %more), to_apply=%plus",
        "%count = s32[] constant(8)",
        "ROOT %both = (f32[1000,4]{1,0}, s32[]) tuple(%scatter-add.1, %count)",
    ],
    "ENTRY": [
        "%p0 = f32[1000,4]{1,0} parameter(0)",
        "%p1 = s32[8]{0} parameter(1)",
        "%p2 = bf16[8,1,4]{2,1,0} parameter(2)",
        "%fusion.1 = f32[8,1,4]{2,1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused_update",
        "%copied = s32[8]{0} copy(%p1)",
        "%fusion.2 = f32[1000,4]{1,0} fusion(%p0, %p1, %fusion.1), calls=%fused_write",
        "ROOT %fusion.3 = (f32[1000,4]{1,0}, s32[]) fusion(%p0, %p1, %fusion.1), calls=%fused_add",
    ],
}
ROW, IDS = 8 * 4 * 4, 8 * 4  # bytes of the rows touched, in float32, and of their ids


def test_kernels_move_the_rows_they_touch():
    update, copied, write, add = (
        hlo_bytes.count_bytes(PROGRAM, [line]) for line in PROGRAM["ENTRY"][3:]
    )
    assert update == ROW + IDS + ROW // 2 + ROW  # found, ids, gradients of 16 bits, sums
    assert copied == 2 * IDS
    assert write == IDS + 2 * ROW  # new rows are read and written, old ones left alone
    assert add == IDS + 3 * ROW + 4  # old rows are read as well; one counter is written
    assert hlo_bytes.count_bytes(PROGRAM, PROGRAM["ENTRY"][3:]) == update + copied + write + add
