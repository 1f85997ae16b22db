"""Who computes what in the Hopper forward: taking work, telling the consumers, reading tiles.

Device functions in Gluon; all of them are inlined.
"""

# Triton's types are not Python's, and a constexpr `if` is decided while compiling.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon

from portattn.backends.triton.hopper_adapter import gl, mbarrier

# Fields of a schedule item (portattn.h).
ITEM_FIELDS = gl.constexpr(16)
Q_START = gl.constexpr(0)
Q_STEP = gl.constexpr(1)
NUM_ROWS = gl.constexpr(2)
TILE_BEGIN = gl.constexpr(3)
TILE_END = gl.constexpr(4)
FULL_FIRST = gl.constexpr(5)
FULL_COUNT = gl.constexpr(6)
FULL_STEP = gl.constexpr(7)
FULL_STRIDE = gl.constexpr(8)
SLOT = gl.constexpr(9)
SLOT_FIRST = gl.constexpr(10)
NUM_PIECES = gl.constexpr(11)
COUNTER = gl.constexpr(12)
# What the producer tells the consumers of an item: its number (-1: no more), layout, batch and
# head, then q_start, q_step, num_rows, tile_begin, num_partial, num_tiles, full_first, full_step,
# full_stride.
MAIL_FIELDS = gl.constexpr(13)


@gluon.jit
def locate(
    index, layouts_ptr, layout_stride_b, layout_stride_h, num_layouts, first_item, num_items,
    num_bh, num_heads, head_group,
):  # fmt: skip
    """Work index -> (item's number, layout, batch, head), ordered as primitives.locate has it."""
    group_programs = head_group * num_items
    first = index // group_programs * head_group
    rest = index % group_programs
    heads = gl.minimum(head_group, num_bh - first)
    bh = first + rest % heads
    batch = bh // num_heads
    head = bh % num_heads
    layout = gl.load(
        layouts_ptr + batch * layout_stride_b + head * layout_stride_h,
        mask=num_layouts > 1,
        other=0,
    )
    return first_item + layout * num_items + rest // heads, layout, batch, head


@gluon.jit
def take_work(counter, num_work):
    """The next work index, from a counter of what programs took beyond their first.

    Whoever takes last leaves the counter at zero: every program takes until there is no more.
    """
    taken = gl.atomic_add(counter, 1, sem="relaxed")
    if taken == num_work - 1:
        gl.store(counter, 0)
    return gl.num_programs(0) + taken


@gluon.jit
def send_item(mail, items_done, values):
    """The producer tells the consumers an item, MAIL_FIELDS numbers; there are two boxes."""
    boxes, full, empty = mail
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    box = items_done & 1
    mbarrier.wait(empty.index(box), ((items_done >> 1) & 1) ^ 1)
    for i in gl.static_range(MAIL_FIELDS):
        boxes.index(box * MAIL_FIELDS + i).store(gl.full([1], values[i], gl.int32, ONE))
    mbarrier.arrive(full.index(box))


@gluon.jit
def mail_field(mail, items_done, FIELD: gl.constexpr):
    """One number of an item that has arrived."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(mail[0].index((items_done & 1) * MAIL_FIELDS + FIELD).load(ONE), 0)


@gluon.jit
def receive_item(mail, items_done):
    """A consumer's next item, as it was sent."""
    _, full, empty = mail
    box = items_done & 1
    mbarrier.wait(full.index(box), (items_done >> 1) & 1)
    item = (
        mail_field(mail, items_done, 0), mail_field(mail, items_done, 1),
        mail_field(mail, items_done, 2), mail_field(mail, items_done, 3),
        mail_field(mail, items_done, 4), mail_field(mail, items_done, 5),
        mail_field(mail, items_done, 6), mail_field(mail, items_done, 7),
        mail_field(mail, items_done, 8), mail_field(mail, items_done, 9),
        mail_field(mail, items_done, 10), mail_field(mail, items_done, 11),
        mail_field(mail, items_done, 12),
    )  # fmt: skip
    mbarrier.arrive(empty.index(box))
    return item


@gluon.jit
def tile_entry(entries, e):
    """(start, step) of an item's tile e: partial tiles, then full ones; past the end (0, 1)."""
    (tiles_ptr, full_list_ptr, tile_begin, num_partial, num_tiles, full_first, full_step,
     full_stride) = entries  # fmt: skip
    partial = e < num_partial
    exists = e < num_tiles
    listed = exists & (e >= num_partial) & (full_step == 0)
    tile = tiles_ptr + (tile_begin + e) * 4
    entry = full_list_ptr + (full_first + e - num_partial) * 2
    start = gl.load(tile, mask=partial, other=0) + gl.load(entry, mask=listed, other=0)
    step = gl.load(tile + 1, mask=partial, other=0) + gl.load(entry + 1, mask=listed, other=0)
    if exists & (e >= num_partial) & (full_step != 0):
        start = full_first + (e - num_partial) * full_stride
        step = full_step
    return start, gl.maximum(step, 1)
