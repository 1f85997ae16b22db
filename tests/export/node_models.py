"""Models of one attention node, made without torch's exporter, which takes seconds."""

import dataclasses

import onnxruntime
import torch
from onnx import TensorProto, helper

import portattn
from portattn import native
from portattn.export.expression import parse_program
from portattn.export.facts import data_facts
from portattn.export.function_body import NodeSignature, build_function
from portattn.export.schema import DOMAIN, OP_NAME, OPSET, OPTIONAL_INPUTS, REQUIRED_INPUTS

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
ARGUMENTS = dict(zip("QKV", ("query", "key", "value"), strict=True))


@dataclasses.dataclass
class Call:
    """One attention call: what the node, and what portattn.attention gets."""

    mask: portattn.masks.Mask | None
    tensors: dict[str, torch.Tensor]
    mode: str = "start"
    q_offset: int = 0
    scale: float = 0.3
    softcap: float = 0.0
    return_lse: bool = False
    constant: bool = False  # the body may rely on the values of the mask's data

    @property
    def data(self):
        return () if self.mask is None else self.mask.data

    @property
    def signature(self):
        alibi = self.tensors.get("alibi_slopes")
        return NodeSignature(
            program=() if self.mask is None else tuple(self.mask.program),
            data_shapes=tuple(tuple(tensor.shape) for tensor in self.data),
            q_offset_mode=self.mode,
            q_offset=self.q_offset,
            scale=self.scale,
            softcap=self.softcap,
            optional_inputs=frozenset(self.tensors) - set(REQUIRED_INPUTS),
            alibi_rank=1 if alibi is None else alibi.ndim,
            return_lse=self.return_lse,
            facts=data_facts(
                parse_program(() if self.mask is None else self.mask.program),
                [tuple(tensor.shape) for tensor in self.data],
                [tensor.numpy() if self.constant else None for tensor in self.data],
            ),
        )

    @property
    def feeds(self):
        arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        return arrays | {f"data_{n}": tensor.numpy() for n, tensor in enumerate(self.data)}

    def model(self, *, body=True):
        """The ONNX model; batch and lengths are dynamic."""
        signature = self.signature
        names = [
            name if name in self.tensors else "" for name in (*REQUIRED_INPUTS, *OPTIONAL_INPUTS)
        ]
        data = {f"data_{n}": tensor for n, tensor in enumerate(self.data)}
        outputs = {"Y": self.tensors["Q"].dtype} | (
            {"LSE": torch.float32} if self.return_lse else {}
        )
        attributes = {"program": list(signature.program)} if signature.program else {}
        node = helper.make_node(
            OP_NAME,
            [*names, *data],
            list(outputs),
            domain=DOMAIN,
            overload=signature.overload,
            q_offset=self.q_offset,
            q_offset_mode=self.mode,
            scale=self.scale,
            softcap=self.softcap,
            **attributes,
        )
        graph = helper.make_graph(
            [node],
            "attention",
            [
                _info(name, tensor.dtype, tensor.ndim)
                for name, tensor in (self.tensors | data).items()
            ],
            [_info(name, dtype, 4 if name == "Y" else 3) for name, dtype in outputs.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
            functions=[build_function(signature)] if body else [],
            ir_version=10,
        )
        return model

    def attention(self, *, dtype=None):
        """The reference's result: in float64, or as eager torch in the inputs' dtype."""
        arguments = {}
        for name, tensor in self.tensors.items():
            floating = tensor.is_floating_point()
            arguments[ARGUMENTS.get(name, name)] = (
                tensor.double() if floating and not dtype else tensor
            )
        q_offset = arguments.pop("q_offset_input", None)
        if self.mode == "value":
            q_offset = self.q_offset if q_offset is None else int(q_offset)
        elif self.mode != "unset" and "kv_lengths" not in arguments:
            q_offset = self.mode
        return portattn.attention(
            **arguments,
            mask=self.mask,
            q_offset=q_offset,
            scale=self.scale,
            softcap=self.softcap,
            enable_gqa=True,
            return_lse=True,
            backend="reference",
            config={"dtype": dtype} if dtype else None,
        )


def _info(name, dtype, rank):
    return helper.make_tensor_value_info(name, TYPES[dtype], [f"{name}_{n}" for n in range(rank)])


def make_call(
    mask,
    seqlen_q,
    seqlen_k,
    *,
    batch=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    head_dim_v=24,
    dtype=torch.float32,
    terms=(),
    **options,
):
    """Random inputs; terms: kv_lengths, alibi, alibi_batch, bias, bias_row, sinks."""
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "Q": random(batch, heads, seqlen_q, head_dim),
        "K": random(batch, kv_heads, seqlen_k, head_dim),
        "V": random(batch, kv_heads, seqlen_k, head_dim_v),
    }
    if "kv_lengths" in terms:
        lengths = [seqlen_k, seqlen_k // 2, 1, 0]
        tensors["kv_lengths"] = torch.tensor(lengths[:batch], dtype=torch.int32)
    if "alibi" in terms:
        tensors["alibi_slopes"] = torch.rand(heads, generator=generator)
    if "alibi_batch" in terms:
        tensors["alibi_slopes"] = torch.rand(batch, heads, generator=generator)
    if "bias" in terms:
        tensors["bias"] = random(1, heads, seqlen_q, seqlen_k)
        tensors["bias"][:, :, seqlen_q // 2] = -torch.inf
    if "bias_row" in terms:
        tensors["bias"] = random(batch, 1, 1, seqlen_k)
    if "sinks" in terms:
        tensors["sinks"] = torch.randn(heads, generator=generator)
    return Call(mask, tensors, **options)


def run_stock(model, feeds):
    """By the function body, in ONNX Runtime as it comes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def library_options():
    """Session options with libportattn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.register_custom_ops_library(str(native.library_path()))
    return options


def run_library(model, feeds):
    """By portattn's kernel."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), library_options())
    return session.run(None, feeds)


def check(results, call):
    """Output and LSE: at most twice eager's error and two roundings from float64."""
    exact, eager = call.attention(), call.attention(dtype="input")
    for got, want, plain in zip(results, exact, eager, strict=False):
        got, want, plain = torch.from_numpy(got).double(), want.double(), plain.double()
        assert got.shape == want.shape
        assert not got.isnan().any()
        empty = want.isinf()
        assert torch.equal(got.isinf(), empty)
        got, want, plain = (tensor.masked_fill(empty, 0.0) for tensor in (got, want, plain))
        if want.numel():
            eps = torch.finfo(call.tensors["Q"].dtype).eps
            allowed = 2 * (plain - want).abs().max() + 2 * eps * want.abs().max()
            assert (got - want).abs().max() <= allowed
