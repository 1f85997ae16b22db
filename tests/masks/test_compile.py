"""Masks inside torch.compile(fullgraph=True): plain attributes, and combining without a break."""

import pytest
import torch

from portattn import masks


def _read(query, mask):
    total = sum(tensor.sum() for tensor in mask.data) if mask.data else 0
    return query * len(mask.program) + total + mask.program[1] + mask.depends_on_query


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mask",
    [masks.causal(), masks.longformer(64, [1, 500]) & ~masks.documents([0, 3, 9])],
    ids=["program", "data"],
)
def test_program_and_data_are_read_in_a_graph(mask):
    query = torch.randn(4, 4)
    compiled = torch.compile(_read, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, mask), _read(query, mask))


def test_masks_combine_in_a_graph():
    def combined(query, mask):
        return _read(query, (mask & masks.causal()) | (mask & masks.sliding_window(8)))

    query, mask = torch.randn(4, 4), masks.KeySet([3, 8]) | masks.Band(0, 9)
    compiled = torch.compile(combined, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, mask), combined(query, mask))


def test_other_data_and_lengths_of_data_do_not_recompile():
    count = 0

    def counting(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(_read, fullgraph=True, backend=counting, dynamic=True)
    query = torch.randn(4, 4)
    for size in (10, 12, 90, 33, 57):
        mask = masks.documents([0, 3, size]) & masks.causal()
        torch.testing.assert_close(compiled(query, mask), _read(query, mask))
    assert count == 1
