"""A checkpoint's tower, adapters folded in, and head as one ONNX graph of standard operators.

Built here rather than traced: a linear layer is one function, in float32 or in 8 bits, and the operators are few enough
for a reader of such a file to list (`dgs.model.onnx_engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import onnx
import onnx.compose
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from open_clip.transformer import LayerScale, ResidualAttentionBlock
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.clip import ClipTower, ConvStem, LeanQuickGELU

OPSET = 20  # the first with Gelu
IR_VERSION = 9
CENTRE, LOW = 128, 32  # zero points of 8-bit activations: any, and after GELU, which is hardly ever below 0

Array = NDArray[Any]
Linear = Callable[["Graph", str, Array, Array, int], str]  # x (R, K), weight (N, K), bias (N,), zero point -> (R, N)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _float(value: float) -> Array:
    return np.array(value, np.float32)


def numbers(tensor: Tensor) -> Array:
    """A tensor's values as a constant."""
    return tensor.detach().cpu().float().numpy()


class Graph:
    """Nodes and constants, in the order in which they are asked for; a value is the name of its tensor."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str | Array, count: int = 1, **attributes: Any) -> Any:
        """Append a node; inputs that are arrays become constants. Returns its output, or `count` of them."""
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        outputs = [f"{kind}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, names, outputs, **attributes))
        return outputs[0] if count == 1 else outputs

    def _constant(self, value: Array) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name


def float_linear(graph: Graph, x: str, weight: Array, bias: Array, _: int) -> str:
    """x W^T + b in float32."""
    return graph.op("Gemm", x, weight, bias, transB=1)


def int8_linear(graph: Graph, x: str, weight: Array, bias: Array, zero: int) -> str:
    """x W^T + b with both factors in 8 bits: a scale for each row of x, from that row alone, and each row of W.

    The products are exact, so that a row of the result depends on no other row of x. Quantised and dequantised tensors
    around a MatMul are the form that ONNX Runtime makes one integer product of. There x's scale has to be a constant:
    it is 1, and the row's own follows the product.
    """
    scales = np.maximum(np.abs(weight).max(axis=1) / 127, 1e-30).astype(np.float32)
    whole = np.round(weight / scales[:, None]).astype(np.int8)
    high = graph.op("Mul", graph.op("ReduceMax", x, _ints(1), keepdims=0), _float(1 / (255 - zero)))
    low = graph.op("Mul", graph.op("ReduceMin", x, _ints(1), keepdims=0), _float(-1 / zero))
    row = graph.op("Max", high, low, _float(1e-30))
    zeros = graph.op("Expand", np.array(zero, np.uint8), graph.op("Shape", row))
    small = graph.op("QuantizeLinear", x, row, zeros, axis=0)
    left = graph.op("DequantizeLinear", small, _float(1), np.array(zero, np.uint8))
    right = graph.op("DequantizeLinear", whole.T, scales, np.zeros(len(scales), np.int8), axis=1)
    product = graph.op("Mul", graph.op("MatMul", left, right), graph.op("Unsqueeze", row, _ints(1)))
    return graph.op("Add", product, bias)


def _merged(layer: Any) -> tuple[Array, Array]:
    """Weight and bias of a linear layer, peft's adapter added if it has one."""
    if hasattr(layer, "get_delta_weight"):
        base = layer.get_base_layer()
        (name,) = layer.active_adapters
        return numbers(base.weight + layer.get_delta_weight(name)), numbers(base.bias)
    return numbers(layer.weight), numbers(layer.bias)


def _norm(graph: Graph, layer: Any, x: str) -> str:
    if isinstance(layer, nn.Identity):
        return x
    return graph.op("LayerNormalization", x, numbers(layer.weight), numbers(layer.bias), epsilon=layer.eps, axis=-1)


def _scaled(graph: Graph, layer: Any, x: str) -> str:
    return graph.op("Mul", x, numbers(layer.gamma)) if isinstance(layer, LayerScale) else x


def _activation(graph: Graph, layer: Any, x: str) -> str:
    if isinstance(layer, LeanQuickGELU):
        return graph.op("Mul", x, graph.op("Sigmoid", graph.op("Mul", x, _float(1.702))))
    return graph.op("Gelu", x, approximate=layer.approximate)


def _patches(graph: Graph, conv: Any, x: str) -> str:
    """(B, 3, S, S) to (B, patches, width)."""
    last = len(conv.convs) - 1 if isinstance(conv, ConvStem) else 0
    for depth, each in enumerate(conv.convs if isinstance(conv, ConvStem) else [conv]):
        bias = () if each.bias is None else (numbers(each.bias),)
        x = graph.op("Conv", x, numbers(each.weight), *bias, strides=each.stride, pads=each.padding * 2)
        if depth < last:
            x = graph.op("Gelu", x)
    return graph.op("Transpose", graph.op("Reshape", x, _ints(0, 0, -1)), perm=[0, 2, 1])


def _attention(graph: Graph, layer: Any, x: str, length: int, linear: Linear) -> str:
    """(B L, W) to (B L, W). Query, key and value are one product; queries are scaled by their weights."""
    (q, q_bias), (k, k_bias), (v, v_bias) = map(_merged, (layer.q_proj, layer.k_proj, layer.v_proj))
    width, heads = len(q), layer.heads
    scale = np.float32((width // heads) ** -0.5)
    weight, bias = np.concatenate([scale * q, k, v]), np.concatenate([scale * q_bias, k_bias, v_bias])
    split = graph.op("Reshape", linear(graph, x, weight, bias, CENTRE), _ints(-1, length, 3 * heads, width // heads))
    query, key, value = graph.op("Split", split, count=3, axis=2, num_outputs=3)
    logits = graph.op(
        "MatMul", graph.op("Transpose", query, perm=[0, 2, 1, 3]), graph.op("Transpose", key, perm=[0, 2, 3, 1])
    )
    mixed = graph.op("MatMul", graph.op("Softmax", logits, axis=-1), graph.op("Transpose", value, perm=[0, 2, 1, 3]))
    flat = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), _ints(-1, width))
    return linear(graph, flat, *_merged(layer.out_proj), CENTRE)


def _statistics(graph: Graph, tokens: str, length: int) -> list[str]:
    """As `dgs.model.backbone.token_statistics`: (B, L, W) to two of (B, W)."""
    patches = graph.op("Slice", tokens, _ints(1), _ints(length), _ints(1))
    mean = graph.op("ReduceMean", patches, _ints(1))
    away = graph.op("Sub", patches, mean)
    total = graph.op("ReduceSum", graph.op("Mul", away, away), _ints(1), keepdims=0)
    variance = graph.op("Mul", total, _float(1 / (length - 2)))  # of length - 1 patches, unbiased
    return [graph.op("Squeeze", mean, _ints(1)), graph.op("Sqrt", graph.op("Add", variance, _float(1e-6)))]


def _require_known(visual: Any) -> None:
    blocks = list(visual.blocks)
    known = type(visual) is ClipTower and visual.attn_pool is None and visual.pool_type in ("tok", "avg")
    if not known or not all(type(block) is ResidualAttentionBlock for block in blocks):
        raise UserError(
            "Expected a CLIP whose image side is a plain vision transformer (as ViT-B-16 or ViT-L-14), found one with "
            f"other parts ({type(visual).__name__} of {type(blocks[0]).__name__}). Score with --engine torch."
        )


def build(backbone: Backbone, head: nn.Linear, linear: Linear) -> onnx.ModelProto:
    """The model "views" (B, S, S, 3) uint8 -> "logits" (B,) float32, for any B.

    Args:
        backbone: with or without adapters; its `precision` is left out of account, floats are float32.
        linear: how the layers of the blocks multiply; attention, LayerNorm, patches and head are float32.

    Raises:
        UserError: a tower with parts that are not built here.
    """
    visual = backbone.visual.get_base_model() if hasattr(backbone.visual, "get_base_model") else backbone.visual
    _require_known(visual)
    graph, (side, _) = Graph(), visual.image_size
    position = numbers(visual.positional_embedding)
    length, width = position.shape
    centred = graph.op("Sub", graph.op("Div", pixels_of(graph), _float(255)), numbers(backbone.mean))
    patches = _patches(graph, visual.conv1, graph.op("Div", centred, numbers(backbone.std)))
    size = graph.op("Concat", graph.op("Shape", "views", start=0, end=1), _ints(1, width), axis=0)
    first = graph.op("Expand", (numbers(visual.class_embedding) + position[0])[None, None], size)
    tokens = graph.op("Concat", first, graph.op("Add", patches, position[1:]), axis=1)
    x = _norm(graph, visual.ln_pre, graph.op("Reshape", tokens, _ints(-1, width)))
    states = [x]  # rows are tokens of all images: (B L, W)
    for block in visual.transformer.resblocks:
        attended = _attention(graph, block.attn, _norm(graph, block.ln_1, x), length, linear)
        x = graph.op("Add", x, _scaled(graph, block.ls_1, attended))
        hidden = linear(graph, _norm(graph, block.ln_2, x), *_merged(block.mlp.c_fc), CENTRE)
        active = _activation(graph, block.mlp.gelu, hidden)
        x = graph.op("Add", x, _scaled(graph, block.ls_2, linear(graph, active, *_merged(block.mlp.c_proj), LOW)))
        states.append(x)
    depth = len(states) - 1
    whole = {k: graph.op("Reshape", states[k], _ints(-1, length, width)) for k in {*backbone.levels, depth}}
    last = whole[depth] if visual.final_ln_after_pool else _norm(graph, visual.ln_post, whole[depth])
    if visual.pool_type == "tok":
        pooled = graph.op("Gather", last, np.array(0, np.int64), axis=1)
    else:
        pooled = graph.op(
            "ReduceMean", graph.op("Slice", last, _ints(1), _ints(length), _ints(1)), _ints(1), keepdims=0
        )
    if visual.final_ln_after_pool:
        pooled = _norm(graph, visual.ln_post, pooled)
    features = [pooled if visual.proj is None else graph.op("MatMul", pooled, numbers(visual.proj))]
    for level in backbone.levels:
        features += _statistics(graph, whole[level], length)
    joined = graph.op("Concat", *features, axis=1)
    return model_of(graph, float_linear(graph, joined, numbers(head.weight), numbers(head.bias), CENTRE), side)


def summed(models: Sequence[onnx.ModelProto], scales: Sequence[float], side: int) -> onnx.ModelProto:
    """One model of several as `model_of` makes them: the sum of their logits, each divided by its scale."""
    graph, logits = Graph(), []
    for number, (model, scale) in enumerate(zip(models, scales, strict=True)):
        own = onnx.compose.add_prefix_graph(model.graph, f"part{number}_", rename_inputs=False)
        graph.nodes += own.node
        graph.constants += own.initializer
        logits.append(graph.op("Div", own.output[0].name, _float(scale)))
    total = graph.op("Unsqueeze", reduce(partial(graph.op, "Add"), logits), _ints(1))
    return model_of(graph, total, side)


def pixels_of(graph: Graph) -> str:
    """The input "views" as (B, 3, S, S) float32, 0 to 255."""
    return graph.op("Transpose", graph.op("Cast", "views", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])


def model_of(graph: Graph, logits: str, side: int) -> onnx.ModelProto:
    """The model "views" (B, side, side, 3) uint8 -> "logits" (B,), of a graph whose value `logits` is (B, 1)."""
    graph.nodes.append(helper.make_node("Squeeze", [logits, graph._constant(_ints(1))], ["logits"]))
    views = helper.make_tensor_value_info("views", TensorProto.UINT8, ["batch", side, side, 3])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch"])
    made = helper.make_graph(graph.nodes, "detector", [views], [output], graph.constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(made, opset_imports=[opset], ir_version=IR_VERSION, producer_name="dgs")
