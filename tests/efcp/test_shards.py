"""How state is divided: blocks never cross parts, and the parts of a tensor are those that DTensor expects."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efcp.shards import ELEMENTWISE, Layout, form_of

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.tensor import Replicate, Shard


class Mesh(SimpleNamespace):
    """As much of a DeviceMesh as a layout asks for."""

    __hash__ = object.__hash__

    @property
    def ndim(self):
        return len(self.sizes)

    def size(self, dim=None):
        return math.prod(self.sizes) if dim is None else self.sizes[dim]


def chunked(size, count):
    """The sizes of the parts into which DTensor cuts a dimension, those of empty ones included."""
    chunk = -(-size // count)
    return [max(0, min(chunk, size - chunk * rank)) for rank in range(count)]


def parts_of(shape, layout):
    """The shapes of the parts of a tensor on all ranks."""
    parts = [tuple(shape)]
    for placement, count in zip(layout.placements, layout.mesh.sizes, strict=True):
        if isinstance(placement, Replicate):
            continue
        dim = placement.dim
        parts = [(*p[:dim], size, *p[dim + 1 :]) for p in parts for size in chunked(p[dim], count)]
    return parts


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    dims = st.integers(0, len(shape) - 1).map(Shard)
    placements = [draw(st.one_of(st.just(Replicate()), dims)) for _ in sizes]
    if len({p.dim for p in placements if isinstance(p, Shard)}) < sum(isinstance(p, Shard) for p in placements):
        placements[1] = Replicate()  # a dimension that is cut twice is FSDP2's with tensor parallelism
    return Layout(shape, Mesh(sizes=sizes), tuple(placements))


@given(layouts(), st.integers(1, 64))
def test_blocks_do_not_cross_parts(layout, wanted):
    size = layout.block_size(wanted, 32768)
    lead = layout.lead(size, layout.shape)
    assert lead is not None
    assert math.prod(lead) * size == math.prod(layout.shape)
    expected = parts_of(lead, layout)
    for part, here in zip(parts_of(layout.shape, layout), expected, strict=True):
        assert math.prod(part) % size == 0
        assert layout.lead(size, part) == here  # as DTensor cuts the blocks


@given(layouts())
def test_the_largest_part(layout):
    parts = parts_of(layout.shape, layout)
    assert layout.largest == tuple(max(sizes) for sizes in zip(*parts, strict=True))
    assert layout.parts == len(parts)
    assert layout.share.replicas * layout.parts == layout.mesh.size()


@given(layouts(), st.integers(1, 64), st.integers(1, 5), st.integers(1, 4))
def test_each_part_holds_its_share_of_every_tensor(layout, wanted, window, kept):
    size, count = layout.block_size(wanted, 32768), math.prod(layout.shape)
    longest = math.prod(layout.largest)
    for part in parts_of(layout.shape, layout):
        own = math.prod(part)
        cases = [
            ("error", (own,), (longest,), None),
            ("rows", (window, own), (window, longest), None),
            ("values", (own // size, window, kept), (longest // size, window, kept), size),
            ("factors", (window, own + 3), (window, longest + 3), None),
        ]
        for name, flat, largest, unit in cases:
            form = form_of(name, flat, largest, unit, layout, part)
            if name in ELEMENTWISE:
                assert form.whole == layout.shape
            whole = torch.Size(form.whole).numel()
            if name == "factors":  # of each part by itself
                assert whole == layout.parts * math.prod(form.here)
                assert math.prod(form.here) >= math.prod(flat)
            else:
                assert whole * own == math.prod(form.here) * count
                assert math.prod(form.here) == math.prod(flat)


@pytest.mark.parametrize(
    ("row", "wanted", "size"),
    [(4096, 4096, 4096), (11008, 4096, 5504), (14336, 4096, 3584), (50257, 4096, 1733), (100, 4096, 100), (7, 3, 7)],
)
def test_a_block_is_the_divisor_of_a_row_nearest_to_what_is_wanted(row, wanted, size):
    assert Layout((8, row)).block_size(wanted, 32768) == size


def test_a_block_is_never_larger_than_positions_can_say():
    assert Layout((2, 65536)).block_size(32768, 32768) == 32768
    assert Layout((2, 3 * 32768)).block_size(60000, 32768) == 32768
