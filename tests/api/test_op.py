"""The torch operator: schema, fake and autograd formulas, torch.compile and torch.export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from portattn import attention, errors, masks
from portattn.masks import Band, Segments

OP = torch.ops.portattn.attention.default
WINDOW = Band(-8, 0)
IDS = torch.arange(40) // 4


def qkv(seqlen_q, seqlen_k, **kwargs):
    return (
        torch.randn(1, 4, seqlen_q, 16, **kwargs),
        torch.randn(1, 2, seqlen_k, 16, **kwargs),
        torch.randn(1, 2, seqlen_k, 8, **kwargs),
    )


def op_arguments(tensors, mask, **changes):
    values = {
        "q_offset": None,
        "q_offset_mode": "end",
        "kv_lengths": None,
        "alibi_slopes": None,
        "bias": None,
        "sinks": None,
        "scale": None,
        "softcap": 0.0,
        "return_lse": True,
        "deterministic": False,
        "backend": "reference",
        "config": "",
    }
    values.update(changes)
    return (*tensors, list(mask.program), list(mask.data), *values.values())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mask", [WINDOW, Segments(IDS, IDS)], ids=["window", "segments"])
def test_opcheck(mask):
    torch.library.opcheck(OP, op_arguments(qkv(10, 12), mask))
    torch.library.opcheck(
        OP, op_arguments(qkv(10, 12), mask, return_lse=False, q_offset=2, q_offset_mode="value")
    )


@pytest.mark.parametrize("mask", [WINDOW, Segments(IDS, IDS)], ids=["window", "segments"])
def test_opcheck_with_gradients(mask):
    terms = {
        "bias": torch.randn(4, 1, 12, requires_grad=True),
        "sinks": torch.randn(4, requires_grad=True),
        "alibi_slopes": torch.randn(1, 4, requires_grad=True),
    }
    tensors = qkv(10, 12, requires_grad=True)
    torch.library.opcheck(OP, op_arguments(tensors, mask, softcap=5.0, scale=0.3, **terms))


def test_opcheck_backward():
    tensors = qkv(6, 9)
    arguments = op_arguments(tensors, WINDOW)
    output, lse = OP(*arguments)
    wanted = [True, False, True, False, False, False]
    torch.library.opcheck(
        torch.ops.portattn.attention_backward.default,
        (torch.randn_like(output), torch.randn_like(lse), output, lse, wanted, *arguments),
    )


def compiles(function, calls):
    """How often torch.compile compiles over the calls; results must be those of eager mode."""
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with torch.no_grad():
        for arguments in calls:
            assert torch.equal(compiled(*arguments), function(*arguments))
    return counter.frame_count


def documents(count, length):
    ids = torch.sort(torch.randint(0, count, (length,)))[0]
    return Segments(ids, ids)


# Two: the first length, and one for all others.
def test_lengths_do_not_recompile():
    def call(query, key, value):
        return attention(
            query, key, value, WINDOW, is_causal=True, enable_gqa=True, backend="reference"
        )

    assert compiles(call, [qkv(n, n) for n in (16, 17, 32, 45, 64, 100, 128, 31)]) <= 2


def test_decode_steps_do_not_recompile():
    def call(query, key, value):
        return attention(
            query, key, value, WINDOW, q_offset="end", enable_gqa=True, backend="reference"
        )

    assert compiles(call, [qkv(1, n) for n in range(30, 38)]) <= 2


def test_documents_do_not_recompile():
    def call(query, key, value, mask):
        return attention(
            query, key, value, mask, is_causal=True, enable_gqa=True, backend="reference"
        )

    sets = ((2, 40), (3, 40), (5, 40), (4, 64), (7, 51), (1, 77))
    calls = [(*qkv(length, length), documents(count, length)) for count, length in sets]
    assert compiles(call, calls) <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "bshd"},
        {"config": {"dtype": "input"}},
        {"q_offset": 3, "scale": 0.25, "softcap": 2.0},
    ],
    ids=["bshd", "config", "scalars"],
)
def test_compiles_with(options):
    def call(query, key, value):
        return attention(query, key, value, WINDOW, backend="reference", **options)

    assert compiles(call, [(torch.randn(1, n, 4, 16),) * 3 for n in (16, 17, 32)]) <= 2


def test_compiles_under_autocast():
    def call(query, key, value):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(query, key, value, enable_gqa=True, backend="reference")

    assert compiles(call, [qkv(n, n) for n in (16, 17, 32)]) <= 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients(backend):
    def call(query, key, value):
        return attention(
            query, key, value, WINDOW, is_causal=True, enable_gqa=True, backend="reference"
        )

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for length in (16, 33):
        tensors = qkv(length, length, requires_grad=True)
        got = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        expected = torch.autograd.grad(call(*tensors).square().sum(), tensors)
        torch.testing.assert_close(got, expected)


def test_inductor_keeps_what_a_kernel_needs_of_strides():
    def call(projected):
        query, key, value = projected.unflatten(-1, (3, 4, 16)).unbind(2)
        output = attention(query + 1, key, value * 2, WINDOW, layout="bshd", backend="reference")
        return output.flatten(2)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (9, 24):
            projected = torch.randn(2, length, 3 * 64)
            torch.testing.assert_close(compiled(projected), call(projected))


def test_lengths_that_depend_on_data():
    def call(tensor, chosen):
        rows = tensor.index_select(2, chosen.nonzero().squeeze(1))
        return attention(rows, rows, rows, WINDOW, q_offset="end", backend="reference")

    tensor, chosen = torch.randn(1, 2, 30, 8), torch.rand(30) < 0.5
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tensor, chosen), call(tensor, chosen))


class Layer(torch.nn.Module):
    """Attention as an exported model has it."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return attention(
            query, key, value, WINDOW, enable_gqa=True, backend="reference", **self.options
        )


def test_export_is_one_node():
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {2: length} for name in ("query", "key", "value")}
    module = Layer(q_offset="end", is_causal=True)
    exported = torch.export.export(module, qkv(16, 16), dynamic_shapes=shapes)
    nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
    attentions = [node for node in nodes if node.target is OP]
    assert len(attentions) == 1
    assert masks.from_program(attentions[0].args[3]) == WINDOW & masks.causal()
    tensors = qkv(23, 23)
    assert torch.equal(exported.module()(*tensors), module(*tensors))


def test_q_offset_is_checked_inside_an_exported_model():
    seqlen_q, seqlen_k = (
        torch.export.Dim(name, min=2, max=4096) for name in ("seqlen_q", "seqlen_k")
    )
    shapes = {"query": {2: seqlen_q}, "key": {2: seqlen_k}, "value": {2: seqlen_k}}
    exported = torch.export.export(Layer(), qkv(16, 24), dynamic_shapes=shapes)
    exported.module()(*qkv(20, 20))
    with pytest.raises(
        errors.MaskError, match=r'q_offset is None with seqlen_q 20 and seqlen_k 21.*"end"'
    ):
        exported.module()(*qkv(20, 21))


def test_masks_of_equal_data_are_found_again():
    tensors = qkv(40, 40)
    mask = Segments(IDS, IDS)
    first = OP(*op_arguments(tensors, mask))[0]
    ids = IDS.clone()
    arguments = op_arguments(tensors, mask)
    again = OP(*arguments[:4], [ids.int(), ids.int()][: len(mask.data)], *arguments[5:])[0]
    assert torch.equal(first, again)


def test_mask_data_changed_in_place_is_seen():
    tensors = qkv(40, 40)
    arguments = op_arguments(tensors, Segments(IDS, IDS))
    data = [tensor.clone() for tensor in arguments[4]]
    before = OP(*arguments[:4], data, *arguments[5:])[0]
    for tensor in data:
        tensor.zero_()
    after = OP(*arguments[:4], data, *arguments[5:])[0]
    dense = attention(*tensors, enable_gqa=True, backend="reference")
    assert not torch.equal(before, after)
    assert torch.equal(after, dense)


def test_unknown_q_offset_mode():
    with pytest.raises(errors.ConfigError, match=r'q_offset_mode is \'middle\'.*"value", "end"'):
        OP(*op_arguments(qkv(4, 4), WINDOW, q_offset_mode="middle"))


def test_fake_tensors_need_no_kernel():
    with torch._subclasses.FakeTensorMode():
        output, lse = attention(*qkv(5, 7), q_offset="end", enable_gqa=True, return_lse=True)
    assert output.shape == (1, 4, 5, 8)
    assert lse.shape == (1, 4, 5)
    meta = [tensor.to("meta") for tensor in qkv(5, 7)]
    assert OP(*op_arguments(meta, WINDOW))[0].device.type == "meta"
