"""Everything a call may not be: the error's type, and its argument, value and way out."""

import pytest
import torch

from portattn import attention, errors, masks
from portattn.backends.reference.forward import ReferenceConfig

Q = torch.randn(2, 4, 10, 16)


def call(query=Q, key=Q, value=Q, mask=None, **options):
    options.setdefault("backend", "reference")
    return attention(query, key, value, mask, **options)


def shaped(*shape, **options):
    return torch.zeros(shape, **options)


SHAPES = {
    "rank": (
        {"query": shaped(4, 10, 16)},
        [
            "query has shape [4, 10, 16]",
            "4-D [batch, num_heads, seqlen_q, head_dim]",
            "tensor[None]",
        ],
    ),
    "rank_of_value": (
        {"value": shaped(10, 16)},
        ["value has shape [10, 16]", "must be 4-D", "reshape"],
    ),
    "rank_bshd": (
        {"key": shaped(10, 16), "layout": "bshd"},
        ["key has shape [10, 16]", "must be 4-D"],
    ),
    "no_tensor": (
        {"query": [[1.0]]},
        ["query is list", "must be a torch.Tensor", "torch.as_tensor"],
    ),
    "heads": (
        {"key": shaped(2, 2, 10, 16), "value": shaped(2, 2, 10, 16)},
        ["query has 4 heads and key has 2", "must be equal", "enable_gqa=True"],
    ),
    "heads_gqa": (
        {"key": shaped(2, 3, 10, 16), "value": shaped(2, 3, 10, 16), "enable_gqa": True},
        ["query has 4 heads and key has 3", "must be a multiple", "repeat or drop heads"],
    ),
    "no_kv_heads": (
        {"key": shaped(2, 0, 10, 16), "value": shaped(2, 0, 10, 16), "enable_gqa": True},
        ["query has 4 heads and key has 0", "must be a multiple"],
    ),
    "value_heads": (
        {"value": shaped(2, 2, 10, 16)},
        ["value has shape [2, 2, 10, 16]", "dimension 1 is 2", "key's heads, 4"],
    ),
    "batch": (
        {"key": shaped(3, 4, 10, 16)},
        ["key has shape [3, 4, 10, 16]", "dimension 0 is 3", "query's batch, 2"],
    ),
    "value_length": (
        {"value": shaped(2, 4, 9, 16)},
        ["value has shape [2, 4, 9, 16]", "dimension 2 is 9", "key's length, 10"],
    ),
    "head_dim_differs": (
        {"key": shaped(2, 4, 10, 8)},
        ["key has shape [2, 4, 10, 8]", "dimension 3 is 8", "query's head_dim, 16"],
    ),
    "head_dim_large": (
        {"query": shaped(1, 1, 2, 257), "key": shaped(1, 1, 2, 257), "value": shaped(1, 1, 2, 8)},
        ["query has head_dim 257", "[1, 256]", "split the head"],
    ),
    "head_dim_v_large": (
        {"value": shaped(2, 4, 10, 300)},
        ["value has head_dim 300", "[1, 256]", "split"],
    ),
    "head_dim_0": ({"value": shaped(2, 4, 10, 0)}, ["value has head_dim 0", "[1, 256]"]),
    "dtypes_mixed": (
        {"key": Q.half()},
        [
            "query torch.float32, key torch.float16, value torch.float32",
            "must be equal",
            "one dtype",
        ],
    ),
    "dtype_unknown": (
        {"query": Q.int(), "key": Q.int(), "value": Q.int()},
        [
            "query has dtype torch.int32",
            "torch.float32, torch.float16 or torch.bfloat16",
            "convert",
        ],
    ),
    "dtype_float64": (
        {"query": Q.double(), "key": Q.double(), "value": Q.double(), "backend": "auto"},
        ["query has dtype torch.float64", 'backend="reference"'],
    ),
    "stride": (
        {"key": Q.transpose(2, 3).contiguous().transpose(2, 3)},
        ["key has stride 10 in its last dimension", "must be 1", "key.contiguous()"],
    ),
    "device": (
        {"key": Q.to("meta")},
        ["query cpu, key meta, value cpu", "one device", ".to(device)"],
    ),
    "sparse": (
        {"query": Q.to_sparse()},
        ["query has layout torch.sparse_coo", "torch.strided", "query.to_dense()"],
    ),
    "kv_lengths_shape": (
        {"kv_lengths": torch.tensor([3])},
        ["kv_lengths has shape [1]", "[2]", "batch"],
    ),
    "kv_lengths_dtype": (
        {"kv_lengths": torch.ones(2)},
        ["kv_lengths has dtype torch.float32", "torch.int32 or torch.int64", "kv_lengths.int()"],
    ),
    "kv_lengths_list": ({"kv_lengths": [3, 4]}, ["kv_lengths is list", "must be a torch.Tensor"]),
    "kv_lengths_device": (
        {"kv_lengths": torch.ones(2, dtype=torch.int32, device="meta")},
        ["kv_lengths is on meta and query on cpu", "kv_lengths.to(query.device)"],
    ),
    "alibi_shape": (
        {"alibi_slopes": torch.ones(3)},
        ["alibi_slopes has shape [3]", "[4] or [2, 4]", "reshape"],
    ),
    "alibi_dtype": (
        {"alibi_slopes": torch.ones(4, dtype=torch.int64)},
        ["alibi_slopes has dtype torch.int64", "floating", ".float()"],
    ),
    "sinks_shape": ({"sinks": torch.ones(2, 4)}, ["sinks has shape [2, 4]", "[4]", "num_heads"]),
    "bias_shape": (
        {"bias": torch.ones(3, 10, 10)},
        ["bias has shape [3, 10, 10]", "[2, 4, 10, 10]", "size 1"],
    ),
    "bias_rank": (
        {"bias": torch.ones(1, 1, 1, 10, 10)},
        ["bias has shape [1, 1, 1, 10, 10]", "broadcast"],
    ),
    "bias_dtype": (
        {"bias": torch.ones(10, 10).half()},
        ["bias has dtype torch.float16", "torch.float32", "bias.to(query.dtype)"],
    ),
    "bias_bool": ({"bias": torch.ones(10, 10) > 0}, ["bias has dtype torch.bool", "masks.dense"]),
    "bias_device": (
        {"bias": torch.ones(10, 10, device="meta")},
        ["bias is on meta and query on cpu", "bias.to(query.device)"],
    ),
}

MASKS = {
    "bool_tensor": (
        {"mask": torch.ones(10, 10) > 0},
        ["mask is a tensor of torch.bool with shape [10, 10]", "masks.dense(tensor)"],
    ),
    "bool_tensor_causal": (
        {"mask": torch.ones(10, 10) > 0, "is_causal": True},
        ["mask is a tensor of torch.bool", "masks.dense(tensor)"],
    ),
    "float_tensor": ({"mask": torch.ones(10, 10)}, ["mask is a tensor of torch.float32", "bias="]),
    "string": ({"mask": "causal"}, ["mask is str 'causal'", "portattn.masks", "sliding_window"]),
    "heads": (
        {"mask": masks.per_head([masks.causal(), masks.All()])},
        ["mask is for 2 heads and query has 4", "rebuild"],
    ),
    "batch": (
        {"mask": masks.padding([1, 2, 3])},
        ["mask is for batch 3 and query has batch 2", "rebuild"],
    ),
    "table_too_small": (
        {"mask": masks.block_sparse(torch.ones(2, 2) > 0, 4)},
        ["BlockTable's table (queries) covers the positions [0, 8)", "[0, 9]", "make it larger"],
    ),
    "documents_too_short": (
        {"mask": masks.documents([0, 3, 8])},
        ["Documents' bounds (queries) covers the positions [0, 8)", "[0, 9]", "make it larger"],
    ),
    "q_offset_needed": (
        {"key": shaped(2, 4, 12, 16), "value": shaped(2, 4, 12, 16), "is_causal": True},
        ["q_offset is None with seqlen_q 10 and seqlen_k 12", '"end"', '"start"'],
    ),
    "q_offset_needed_alibi": (
        {
            "key": shaped(2, 4, 12, 16),
            "value": shaped(2, 4, 12, 16),
            "alibi_slopes": torch.ones(4),
        },
        ["q_offset is None", "ALiBi", '"end"'],
    ),
    "q_offset_name": ({"q_offset": "middle"}, ["q_offset is 'middle'", '"end"', '"start"']),
    "q_offset_float": ({"q_offset": 1.5}, ["q_offset is 1.5", "integer"]),
}

CONFIGS = {
    "backend": (
        {"backend": "tpu"},
        ["backend is 'tpu'", '"auto"', "reference, cpu, triton, cupy", "cpu_forward"],
    ),
    "layout": ({"layout": "sbhd"}, ["layout is 'sbhd'", '"bhsd" or "bshd"', "transpose"]),
    "scale": ({"scale": float("nan")}, ["scale is nan", "finite", "None for head_dim ** -0.5"]),
    "scale_text": ({"scale": "1"}, ["scale is '1'", "finite number"]),
    "softcap": ({"softcap": -1.0}, ["softcap is -1.0", "above 0", "None"]),
    "config_type": ({"config": 3}, ["config is 3", "mapping", "explain"]),
    "config_value": ({"config": {"dtype": 1.5}}, ["config is {'dtype': 1.5}", "int, bool or str"]),
    "config_field": (
        {"config": {"block_q": 64}},
        ["config of reference", "['block_q']", "['dtype']"],
    ),
    "config_field_type": (
        {"config": {"dtype": 3}},
        ["config field dtype of reference is 3", "str"],
    ),
    "config_impossible": (
        {"config": {"dtype": "float8"}},
        ["ReferenceConfig(dtype='float8')", "'float64', 'input'", "config=None"],
    ),
    "config_other_kernel": (
        {"config": ReferenceConfig(), "backend": "cpu"},
        ["config is a ReferenceConfig", "CpuForwardConfig", "name its kernel"],
    ),
    "kv_lengths_and_q_offset": (
        {"kv_lengths": torch.tensor([3, 4]), "q_offset": 0},
        ["q_offset is 0 beside kv_lengths", 'None or "end"', "drop one"],
    ),
}


@pytest.mark.parametrize(("options", "parts"), SHAPES.values(), ids=SHAPES)
def test_shape_errors(options, parts):
    with pytest.raises(errors.ShapeError) as caught:
        call(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(("options", "parts"), MASKS.values(), ids=MASKS)
def test_mask_errors(options, parts):
    with pytest.raises(errors.MaskError) as caught:
        call(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(("options", "parts"), CONFIGS.values(), ids=CONFIGS)
def test_config_errors(options, parts):
    with pytest.raises(errors.ConfigError) as caught:
        call(**options)
    for part in parts:
        assert part in str(caught.value)


def test_an_error_is_not_remembered_as_an_answer():
    for _ in range(2):
        with pytest.raises(errors.ShapeError):
            call(key=Q[:, :2], value=Q[:, :2])
    call(key=Q[:, :2], value=Q[:, :2], enable_gqa=True)
