"""3x3 convolutions in fewer multiplications, for processors: Winograd's F(4x4, 3x3), a function of the file.

A 4x4 tile of the output takes 36 products of channels instead of 144 (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2015), and neither onnxruntime nor OpenVINO does so on x86. The transforms are
one convolution and one matrix product here, the products a batched matrix product, all in standard ops, so
both runtimes execute them with their fastest kernels. The rounding is that of float32 with sums of larger
numbers: about five times a direct convolution's. The engine builder turns the nodes back into ``Conv``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anchorline.export.functions import map_sides
from anchorline.export.graph_settings import contract_in, set_contract
from anchorline.runtime.canvas import usual_canvas
from anchorline.runtime.contract import DOMAIN, OP_VERSION, WINOGRAD_OP

TILE, KERNEL = 4, 3
WINDOW = TILE + KERNEL - 1
# Where the polynomials are evaluated, besides infinity. Of a zero and two pairs these round least of those
# tried, three times less than the usual 0, 1, -1, 2, -2.
POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))

# Where the transforms and the larger weights cost less than the multiplications they save, measured on both
# runtimes: channels in and out, and the products of channels of one window point.
FEWEST_CHANNELS = 128
LEAST_WORK = 10_000_000

# A node keeps its attributes as a ``Conv``, which the function has no use for, so that it can be one again.
_OF_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def transforms() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Of a kernel [36, 9], of a window of the input [36, 36], of the products to a tile [16, 36].

    Toom and Cook's construction from ``POINTS``, once down and once across. Each row of the first is scaled
    by a power of two to about one, and the second by its inverse.
    """
    others = [[other for other in POINTS if other != point] for point in POINTS]
    g, bt, at = np.zeros((WINDOW, KERNEL)), np.zeros((WINDOW, WINDOW)), np.zeros((TILE, WINDOW))
    for row, (point, rest) in enumerate(zip(POINTS, others, strict=True)):
        divisor = math.prod(point - other for other in rest)
        g[row] = [float(point**power / divisor) for power in range(KERNEL)]
        bt[row, :-1] = [float(each) for each in _polynomial(rest)]
        at[:, row] = [float(point**power) for power in range(TILE)]
    g[-1, -1] = at[-1, -1] = 1.0  # infinity
    bt[-1] = [float(each) for each in _polynomial(POINTS)]
    scale = 2.0 ** np.round(np.log2(np.abs(g).max(axis=1, keepdims=True)))
    g, bt = g / scale, bt * scale
    return _both_ways(g), _both_ways(bt), _both_ways(at)


def _both_ways(matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.kron(matrix, matrix).astype(np.float32)


def winograd_function() -> onnx.FunctionProto:
    """``anchorline::WinogradConv(x [B, C, H, W], w [O, C, 3, 3], b [O]) -> [B, O, H, W]``: padding 1.

    What it makes of ``w`` is constant, so a runtime computes it once, when it opens the file.
    """
    g, bt, at = transforms()
    points, cells = WINDOW**2, TILE**2
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : 18]>
    {WINOGRAD_OP} <{", ".join(_OF_CONV)}> (x, w, b) => (y)
    {{
        points = Constant <value_ints = [{points}]> ()
        cells = Constant <value_ints = [{cells}]> ()
        rest = Constant <value_ints = [-1]> ()
        batch = Shape <start = 0, end = 1> (x)
        inputs = Shape <start = 1, end = 2> (x)
        outputs = Shape <start = 0, end = 1> (w)
        sides = Shape <start = 2> (x)
        w_last = Transpose <perm = [2, 3, 0, 1]> (w)
        w_rows_shape = Constant <value_ints = [{KERNEL**2}, -1]> ()
        w_rows = Reshape (w_last, w_rows_shape)
        g = Constant <value = {_tensor(g)}> ()
        u_rows = MatMul (g, w_rows)
        u_shape = Concat <axis = 0> (points, outputs, inputs)
        u = Reshape (u_rows, u_shape)
        one_map = Constant <value_ints = [-1, 1]> ()
        maps_shape = Concat <axis = 0> (one_map, sides)
        maps = Reshape (x, maps_shape)
        bt = Constant <value = {_tensor(bt.reshape(points, 1, WINDOW, WINDOW))}> ()
        windows = Conv <kernel_shape = [{WINDOW}, {WINDOW}], strides = [{TILE}, {TILE}],
            pads = [1, 1, {TILE}, {TILE}]> (maps, bt)
        tiles = Shape <start = 2> (windows)
        v_shape = Concat <axis = 0> (batch, inputs, points, rest)
        v_by_channel = Reshape (windows, v_shape)
        v = Transpose <perm = [0, 2, 1, 3]> (v_by_channel)
        products = MatMul (u, v)
        rows_shape = Concat <axis = 0> (batch, points, rest)
        product_rows = Reshape (products, rows_shape)
        at = Constant <value = {_tensor(at)}> ()
        cell_rows = MatMul (at, product_rows)
        cell_maps = Mul (cells, outputs)
        cells_shape = Concat <axis = 0> (batch, cell_maps, tiles)
        cells_of_tiles = Reshape (cell_rows, cells_shape)
        tiled = DepthToSpace <blocksize = {TILE}, mode = "DCR"> (cells_of_tiles)
        begin = Constant <value_ints = [0, 0]> ()
        axes = Constant <value_ints = [2, 3]> ()
        cropped = Slice (tiled, begin, sides, axes)
        bias_shape = Constant <value_ints = [1, -1, 1, 1]> ()
        bias = Reshape (b, bias_shape)
        y = Add (cropped, bias)
    }}
    """
    return onnx.parser.parse_function(text)


def make_winograd(model: onnx.ModelProto) -> int:
    """``use_winograd`` in an exported file, on its usual canvas; the contract's ``source`` says how many."""
    contract = contract_in(model)
    count = use_winograd(model, usual_canvas(contract))
    set_contract(model, dataclasses.replace(contract, source={**contract.source, "winograd": count}))
    return count


def use_winograd(model: onnx.ModelProto, canvas: tuple[int, int]) -> int:
    """Let the convolutions of ``model`` that gain by it call the function, in place; returns how many.

    They gain or not by the size that their maps have on ``canvas`` (height, width), and are right on any.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    sides = map_sides(model, canvas)
    count = 0
    for node in model.graph.node:
        if not _is_plain(node) or node.input[1] not in weights or node.input[0] not in sides:
            continue
        outputs, inputs, *kernel = weights[node.input[1]].dims
        tiles = int(np.prod([-(-side // TILE) for side in sides[node.input[0]]]))
        work = outputs * inputs * tiles
        if kernel != [KERNEL, KERNEL] or min(outputs, inputs) < FEWEST_CHANNELS or work < LEAST_WORK:
            continue
        if len(node.input) < 3:
            zeros = f"{node.input[1]}_no_bias"
            if zeros not in weights:
                weights[zeros] = numpy_helper.from_array(np.zeros(outputs, np.float32), zeros)
                model.graph.initializer.append(weights[zeros])
            node.input.append(zeros)
        node.domain, node.op_type = DOMAIN, WINOGRAD_OP
        count += 1
    if count:
        model.functions.append(winograd_function())
        if DOMAIN not in {opset.domain for opset in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(DOMAIN, OP_VERSION))
    return count


def _is_plain(node: onnx.NodeProto) -> bool:
    """A convolution of stride 1 with a padding of 1."""
    if node.op_type != "Conv" or node.domain:
        return False
    options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    plain = {"group": 1, "strides": [1, 1], "dilations": [1, 1], "auto_pad": b"NOTSET"}
    if any(options.get(name, value) != value for name, value in plain.items()):
        return False
    return options.get("pads") == [1, 1, 1, 1]


def _polynomial(roots: Iterable[Fraction]) -> list[Fraction]:
    """The coefficients, the constant first, of the polynomial with these roots."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [
            above - root * below for above, below in zip(shifted, [*coefficients, Fraction(0)], strict=True)
        ]
    return coefficients


def _tensor(values: NDArray[np.float32]) -> str:
    """``values`` as a constant in ONNX's text form."""
    sides = ", ".join(map(str, values.shape))
    return f"float[{sides}] {{{', '.join(repr(float(value)) for value in values.ravel())}}}"
