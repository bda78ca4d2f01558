"""An exported file with other settings: proposals, resize rule, classes. The weights stay as they are.

What a fresh export of the same checkpoint under these settings would give, made in a second, without
PyTorch. The exporter writes counts into many places of the graph: the K of a TopK, the shapes of Reshape and
Expand, the number of proposals that a place among all scores is divided by. Two TopK and two Slice nodes
decide them; what follows is found by inferring every later shape twice, with the old numbers and with the new
ones (``_Changes``). A graph in which that is not clear is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from anchorline.runtime.contract import CONTRACT_KEY, DOMAIN, Contract, ResizeRule
from anchorline.runtime.io.errors import ArtefactError, SettingsError, check_count, shown

# Stand for the batch, and for the slots that hold a proposal (``Occupied``), while shapes are inferred:
# primes that divide no count of a graph.
_BATCH, _SLOTS = 1_000_003, 1_000_033
# What shapes are computed by from others.
_OF_SHAPES = frozenset(("Cast", "Concat", "Mul", "Reshape", "Shape", "Squeeze", "Unsqueeze"))
_SMALL = 64  # elements; constants with more are no shapes and no counts

Dims = tuple[int, ...]
Types = dict[str, TypeProto]


@dataclass(frozen=True)
class GraphSettings:
    """What a file shall have; None leaves it.

    ``proposals`` that the RPN hands on, ``pre_nms`` the best of each level before its NMS: at most as many as
    the file has. ``classes`` are the names that are detected, some of the file's, in its order; the scores
    are those that they had among all. ``resize`` is the rule of a file for any frame size.
    """

    proposals: int | None = None
    pre_nms: int | None = None
    resize: ResizeRule | None = None
    classes: tuple[str, ...] | None = None


def proposal_counts(model: onnx.ModelProto) -> tuple[int, int]:
    """The ``proposals`` and ``pre_nms`` of an exported file; raises ``ArtefactError`` where it shows none."""
    graph = model.graph
    before, after = _proposal_nodes(graph)
    values = _small_constants(graph)
    try:
        counts = [int(values[node.input[1]].item()) for node in (after, *before)]
    except KeyError:
        raise _unclear("its TopK nodes take no constant count") from None
    return counts[0], max(counts[1:])


def with_settings(model: onnx.ModelProto, settings: GraphSettings) -> onnx.ModelProto:
    """A copy of the exported ``model`` with ``settings``, in its graph and its contract.

    Raises ``SettingsError`` for settings that the file cannot have, ``ArtefactError`` for a graph that is not
    as anchorline exports it.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    contract = contract_in(result)
    names, ids = contract.names, contract.category_ids
    changes = _Changes(result)
    before, after = _proposal_nodes(result.graph)
    proposals, pre_nms = proposal_counts(result)
    if settings.pre_nms is not None:
        _check_fewer("pre_nms", settings.pre_nms, pre_nms)
        for node in before:
            changes.counts[node.output[0]] = settings.pre_nms
    if settings.proposals is not None:
        _check_fewer("proposals", settings.proposals, proposals)
        changes.counts[after.output[0]] = settings.proposals
    if settings.classes is not None:
        kept = _kept_classes(contract, settings.classes)
        changes.columns = [index + 1 for index in kept]  # the background comes first
        names = settings.classes
        ids = None if ids is None else tuple(ids[index] for index in kept)
    changes.carry_out()
    thresholds = dataclasses.replace(contract.thresholds, max_proposals=proposal_counts(result)[0])
    resize = contract.resize
    if settings.resize is not None:
        if contract.canvas is not None:
            raise SettingsError(
                f"resize is {settings.resize}, but the model was made for one canvas, {contract.canvas}; "
                "export it for any frame size"
            )
        resize = dataclasses.replace(settings.resize, padding=resize.padding)
    contract = dataclasses.replace(
        contract, thresholds=thresholds, resize=resize, names=names, category_ids=ids
    )
    set_contract(result, contract)
    onnx.checker.check_model(result)
    return result


def scaled(rule: ResizeRule, scale: float) -> ResizeRule:
    """``rule`` with its sides times ``scale``, in whole pixels."""

    def side(pixels: int) -> int:
        return max(1, round(pixels * scale))

    return dataclasses.replace(
        rule,
        shorter_side=rule.shorter_side and side(rule.shorter_side),
        longer_side=rule.longer_side and side(rule.longer_side),
        within=rule.within and (side(rule.within[0]), side(rule.within[1])),
    )


def set_contract(model: onnx.ModelProto, contract: Contract) -> None:
    """Put ``contract`` in the place of the model's own."""
    for entry in model.metadata_props:
        if entry.key == CONTRACT_KEY:
            entry.value = contract.to_json()


def contract_in(model: onnx.ModelProto) -> Contract:
    """The model's own; raises ``ArtefactError`` where it has none."""
    texts = [entry.value for entry in model.metadata_props if entry.key == CONTRACT_KEY]
    if not texts:
        raise ArtefactError("the model has no anchorline contract; give an ONNX file that export wrote")
    return Contract.from_json(texts[-1])


def _check_fewer(name: str, wanted: int, there: int) -> None:
    check_count(name, wanted)
    if wanted > there:
        raise SettingsError(
            f"{name} is {wanted}, but the file has {there}; expected at most as many, or export the "
            "checkpoint with more"
        )


def _kept_classes(contract: Contract, names: Sequence[str]) -> list[int]:
    """The places of ``names`` among the contract's."""
    if contract.task != "detections":
        raise SettingsError("classes are given, but the model gives proposals, which have none")
    unknown = [name for name in names if name not in contract.names]
    if unknown or not names or len({*names}) < len(names):
        wrong = f"has {shown(unknown[0])}" if unknown else f"is {shown(tuple(names))}"
        raise SettingsError(
            f"classes {wrong}; expected names of the model, each once: {shown(contract.names)}"
        )
    return [contract.names.index(name) for name in names]


def _unclear(reason: str) -> ArtefactError:
    return ArtefactError(
        f"the graph's counts cannot be changed: {reason}; export the model again with this anchorline"
    )


def _small_constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if math.prod(tensor.dims) <= _SMALL
    }


def _proposal_nodes(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], onnx.NodeProto]:
    """The TopK of each level before the RPN's NMS, and the one after it."""
    places = [number for number, node in enumerate(graph.node) if node.op_type == "BatchedNMS"]
    if not places:
        raise _unclear("it has no BatchedNMS")
    suppressed = {*graph.node[places[0]].output}
    before = [node for node in graph.node[: places[0]] if node.op_type == "TopK"]
    for node in graph.node[places[0] + 1 :]:
        if node.op_type == "TopK" and before and node.input[0] in suppressed:
            return before, node
        if node.op_type == "Reshape" and node.input[0] in suppressed:
            suppressed.update(node.output)
    raise _unclear("no TopK stands before and after the RPN's NMS")


def _find_slices(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The Slice nodes that leave out the background: of the class scores, and of the box deltas."""
    softmax = [node.output[0] for node in graph.node if node.op_type == "Softmax"]
    read = {softmax[-1] if softmax else "", "box_regression"}
    values, slices = _small_constants(graph), []
    for node in graph.node:
        if node.op_type == "Slice" and node.input[0] in read:
            if node.input[2] in values:
                slices.append(node)
            else:  # the rows that hold a proposal
                read.add(node.output[0])
    if len(slices) != 2:
        raise _unclear("the background is not left out by one Slice each of scores and boxes")
    return slices


class _Changes:
    """New numbers for a graph and what follows from them.

    ``counts`` are those of TopK nodes by the name of their first output, ``columns`` the classes to keep,
    counted with the background.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.counts: dict[str, int] = {}
        self.columns: list[int] | None = None
        self._model, self._graph = model, model.graph
        self._constants = _small_constants(model.graph)
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        self._types = {name: self._numbered(kind) for name, kind in _stated_types(model.graph)}
        self._moved: dict[str, tuple[TypeProto, TypeProto]] = {}  # tensors that get another shape
        self._shapes: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}  # values of Shape nodes
        # Of flat scores the number within a group, and so of the places that a TopK finds among them.
        self._inner: dict[str, tuple[int, int]] = {}
        self._proposals = (0, 0)  # before and after, once ``Occupied`` has left out the slots without one

    def carry_out(self) -> None:
        """Change the graph in place; raises ``ArtefactError`` where it is not clear how."""
        sliced = [node.output[0] for node in _find_slices(self._graph)] if self.columns is not None else []
        for node in self._graph.node:
            self._follow(node, node.output[0] in sliced)
        for value in (*self._graph.value_info, *self._graph.output):
            if value.name in self._moved:
                self._state(value.type.tensor_type, _dims(self._moved[value.name][1]))
        read = {name for node in self._graph.node for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _follow(self, node: onnx.NodeProto, is_sliced: bool) -> None:
        if node.op_type == "Occupied":
            sides = [self._of(node.input[0], side) for side in (0, 1)]
            self._proposals = _dims(sides[0])[1], _dims(sides[1])[1]
            self._types[node.output[0]] = _with_side(sides[0], 1, _SLOTS)
            return
        if self._proposals[0]:
            self._count_slots(node)
        moves = any(name in each for each in (self._moved, self._shapes, self._inner) for name in node.input)
        if not moves and not is_sliced and node.output[0] not in self.counts:
            return
        before = onnx.NodeProto()
        before.CopyFrom(node)
        if is_sliced:
            self._keep_columns(node)
        else:
            self._renew(node)
        old, new = self._infer(before, 0), self._infer(node, 1)
        for name in node.output:
            if name not in new:
                continue
            if not _is_known(new[name]) or not _is_known(old[name]):
                raise _unclear(f"the shape of {name} is not known")
            if _dims(old[name]) != _dims(new[name]):
                self._moved[name] = old[name], new[name]
        if node.op_type == "Shape":
            parts = (_shape_value(node, self._of(node.input[0], side)) for side in (0, 1))
            self._shapes[node.output[0]] = next(parts), next(parts)
        elif node.op_type == "TopK" and node.input[0] in self._inner:
            self._inner[node.output[1]] = self._inner[node.input[0]]
        elif node.op_type in ("Cast", "Identity") and node.input[0] in self._inner:
            self._inner[node.output[0]] = self._inner[node.input[0]]

    def _count_slots(self, node: onnx.NodeProto) -> None:
        """Find the types of what ``node`` gives, which no file can state behind ``Occupied``, and what it
        reads of shapes; let it count the slots without a proposal right."""
        for name in node.input:
            self._value(name, 0)
        if not all(_is_known(self._types[name]) for name in node.output if name in self._types):
            self._types.update(self._infer(node, 0))
        if node.op_type == "Sub" and self._value(node.input[1], 0) == _SLOTS:
            everything = self._constants.get(node.input[0])
            if everything is None or everything.item() != self._proposals[0]:
                raise _unclear(f"{node.name} does not count the slots without a proposal")
            sides = [np.asarray(count - _SLOTS, everything.dtype) for count in self._proposals]
            self._shapes[node.output[0]] = sides[0], sides[1]
            self._put(node, 0, everything, self._proposals[1])

    def _value(self, name: str, side: int) -> NDArray[Any] | None:
        """What a tensor holds before (0) or after (1) the changes, where it is a constant or computed from
        known shapes."""
        maker = self._makers.get(name)
        if name not in self._shapes and maker is not None and maker.op_type in _OF_SHAPES:
            sides = [self._evaluate(maker, each) for each in (0, 1)]
            if sides[0] is not None and sides[1] is not None:
                self._shapes[name] = sides[0], sides[1]
        return self._shapes[name][side] if name in self._shapes else self._constants.get(name)

    def _evaluate(self, node: onnx.NodeProto, side: int) -> NDArray[Any] | None:
        if node.op_type == "Shape":
            sides = _shape_value(node, self._of(node.input[0], side))
            return sides if sides.all() else None
        given = {name: self._value(name, side) for name in node.input}
        if any(value is None for value in given.values()):
            return None
        (result,) = cast("list[Any]", ReferenceEvaluator(node).run(None, given))
        return np.asarray(result)

    def _of(self, name: str, side: int) -> TypeProto:
        """Type and shape of a tensor before (0) or after (1) the changes."""
        return self._moved[name][side] if name in self._moved else self._types[name]

    def _renew(self, node: onnx.NodeProto) -> None:
        """Give ``node``, some of whose inputs have new shapes, the constants that go with them."""
        moved, constant = self._moved.get(node.input[0]), None
        if len(node.input) > 1:
            constant = self._constants.get(node.input[1])
        if node.op_type == "TopK":
            if constant is None:
                return  # as many as there are, for which ``_infer`` has to know how many
            there = _dims(moved[1])[_axis(node)] if moved else self.counts[node.output[0]]
            wanted = self.counts.get(node.output[0], int(constant.item()))
            self._put(node, 1, constant, [min(wanted, there)])
        elif node.op_type == "Reshape" and moved and constant is not None:
            self._put(node, 1, constant, self._new_shape(node, _dims(moved[0]), _dims(moved[1]), constant))
        elif node.op_type == "Reshape" and moved and node.input[1] in self._shapes:
            stated = self._shapes[node.input[1]][0]
            renewed = np.array(self._new_shape(node, _dims(moved[0]), _dims(moved[1]), stated))
            node.input[1] = self._computed(node.input[1], renewed)
        elif node.op_type == "Expand" and moved and constant is not None:
            pairs = zip(reversed(constant.tolist()), *map(reversed, map(_dims, moved)), strict=False)
            aligned = [now if stated == was else stated for stated, was, now in pairs]
            self._put(node, 1, constant, [*constant.tolist()[: -len(aligned)], *reversed(aligned)])
        elif node.op_type in ("Div", "Mod") and node.input[0] in self._inner and constant is not None:
            was, now = self._inner[node.input[0]]
            if constant.size != 1 or constant.item() != was:
                raise _unclear(f"{node.name} does not divide by the {was} places of a class")
            self._put(node, 1, constant, np.full(constant.shape, now))

    def _put(self, node: onnx.NodeProto, place: int, old: NDArray[Any], values: Any) -> None:
        """Let ``node`` read ``values`` in the place of the constant ``old``, which others may read too."""
        new = np.asarray(values, old.dtype).reshape(old.shape)
        if (new == old).all():
            return
        node.input[place] = self._add(f"{node.output[0]}.{node.op_type.lower()}", new)

    def _computed(self, name: str, wanted: NDArray[np.int64]) -> str:
        """In the place of ``name`` a tensor that is ``wanted`` after the changes, computed in the same way
        from other constants."""
        now, maker = self._value(name, 1), self._makers.get(name)
        if now is None or (now == wanted).all():
            return name
        wanted = np.asarray(wanted, now.dtype).reshape(now.shape)
        if maker is None:
            return self._add(f"{name}.count", wanted)
        if maker.op_type == "Concat":
            sizes = [math.prod(_dims(self._of(each, 1))) for each in maker.input]
            parts = np.split(wanted, np.cumsum(sizes)[:-1])
            maker.input[:] = [self._computed(*each) for each in zip(maker.input, parts, strict=True)]
        elif maker.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Cast"):
            maker.input[0] = self._computed(maker.input[0], wanted)
        elif maker.op_type == "Mul" and maker.input[1] in self._constants:
            maker.input[1] = self._computed(maker.input[1], wanted // self._shapes[maker.input[0]][1])
        else:
            raise _unclear(f"{maker.name} computes {now.tolist()}, where {wanted.tolist()} is to stand")
        self._shapes[name] = self._shapes[name][0], wanted
        return name

    def _add(self, wanted: str, values: NDArray[Any]) -> str:
        """A new constant; its name is ``wanted``, or longer where an earlier change has made one."""
        name = wanted
        while name in self._types:
            name += "_"
        tensor = numpy_helper.from_array(values, name)
        self._graph.initializer.append(tensor)
        self._constants[name] = values
        self._types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        return name

    def _keep_columns(self, node: onnx.NodeProto) -> None:
        """Turn the Slice that leaves out the background into a Gather of the columns to keep."""
        axis = int(self._constants[node.input[3]].item())
        columns = self._add(f"{node.output[0]}.columns", np.array(self.columns, np.int64))
        source, result, name = node.input[0], node.output[0], node.name
        node.CopyFrom(helper.make_node("Gather", [source, columns], [result], name, axis=axis))

    def _new_shape(self, node: onnx.NodeProto, old: Dims, new: Dims, stated: NDArray[Any]) -> list[int]:
        """The shape that takes the place of ``stated``, where the input had ``old`` sides and has ``new``.

        Both shapes fall into runs of equally many elements; within one, the side that is not the batch grows
        or shrinks.
        """
        target = [int(side) for side in stated]
        known = math.prod(side for side in target if side > 0)
        full = [math.prod(old) // known if side == -1 else side for side in target]
        renewed = list(target)
        for inside, outside in _runs(old, full):
            was, now = (math.prod(dims[axis] for axis in inside) for dims in (old, new))
            free = [axis for axis in outside if full[axis] not in (1, _BATCH)]
            if was == now:
                continue
            changed = [axis for axis in free if full[axis] * now % was == 0]
            if len(changed) != 1:
                raise _unclear(f"{node.name} may split {now} in several ways")
            if target[changed[0]] != -1:
                renewed[changed[0]] = full[changed[0]] * now // was
            merged = [axis for axis in inside if old[axis] not in (1, _BATCH)]
            if len(outside) == 1 or len(merged) > 1:
                self._inner[node.output[0]] = old[merged[-1]], new[merged[-1]]
        return renewed

    def _infer(self, node: onnx.NodeProto, side: int) -> Types:
        """Types and shapes of what ``node`` gives, before (0) or after (1) the changes."""
        if node.domain == DOMAIN:
            return _custom_types(node, [self._of(name, side) for name in node.input])
        if node.op_type == "TopK":  # onnx says nothing where the number to choose from is free
            counted = self._value(node.input[1], side)
            axis, count = _axis(node), 0 if counted is None else int(counted.item())
            best = TypeProto()
            best.CopyFrom(self._of(node.input[0], side))
            best.tensor_type.shape.dim[axis].dim_value = count
            places = helper.make_tensor_type_proto(onnx.TensorProto.INT64, _dims(best))
            return dict(zip(node.output, (best, places), strict=True))
        types = {name: self._of(name, side) for name in node.input if name}
        values = {name: self._value(name, side) for name in types}
        end = values[node.input[2]] if node.op_type == "Slice" else None
        if end is not None and end.max() == _SLOTS:  # more than there seem to be
            axis = int(self._constants[node.input[3]].item())
            return {node.output[0]: _with_side(types[node.input[0]], axis, _SLOTS)}
        data = {
            name: numpy_helper.from_array(value, name) for name, value in values.items() if value is not None
        }
        opset = max(each.version for each in self._model.opset_import if not each.domain)
        schema = onnx.defs.get_schema(node.op_type, opset)
        try:
            return onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, None, list(self._model.opset_import), self._model.ir_version
            )
        except onnx.shape_inference.InferenceError as error:
            raise _unclear(f"{node.name}: {' '.join(str(error).split())[:200]}") from None

    def _numbered(self, kind: TypeProto) -> TypeProto:
        """The type with the batch as a number."""
        result = TypeProto()
        result.CopyFrom(kind)
        for side in result.tensor_type.shape.dim:
            if side.dim_param and side.dim_param == self._batch:
                side.dim_value = _BATCH
        return result

    def _state(self, kind: TypeProto.Tensor, dims: Dims) -> None:
        """Note the new shape of a tensor, the batch by its name, what is counted over it as free."""
        for side, number in zip(kind.shape.dim, dims, strict=True):
            if number == _BATCH:
                side.dim_param = self._batch
            elif number % _BATCH == 0 or number % _SLOTS == 0:
                side.Clear()
            else:
                side.dim_value = number


def _stated_types(graph: onnx.GraphProto) -> Iterator[tuple[str, TypeProto]]:
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type
    for tensor in graph.initializer:
        yield tensor.name, helper.make_tensor_type_proto(tensor.data_type, tensor.dims)


def _custom_types(node: onnx.NodeProto, given: Sequence[TypeProto]) -> Types:
    """What the custom ops give: scores like the scores, or a pooled map for each RoI."""
    if node.op_type == "BatchedNMS":
        return {node.output[0]: given[1]}
    size = next(each.i for each in node.attribute if each.name == "output_size")
    channels = given[0].tensor_type.shape.dim[1].dim_value
    dims = [math.prod(_dims(given[1])[:2]), channels, size, size]
    return {node.output[0]: helper.make_tensor_type_proto(given[0].tensor_type.elem_type, dims)}


def _with_side(kind: TypeProto, axis: int, size: int) -> TypeProto:
    result = TypeProto()
    result.CopyFrom(kind)
    result.tensor_type.shape.dim[axis].dim_value = size
    return result


def _axis(node: onnx.NodeProto) -> int:
    return next((each.i for each in node.attribute if each.name == "axis"), -1)


def _dims(kind: TypeProto) -> Dims:
    return tuple(side.dim_value for side in kind.tensor_type.shape.dim)


def _is_known(kind: TypeProto) -> bool:
    return kind.tensor_type.HasField("shape") and all(
        side.HasField("dim_value") for side in kind.tensor_type.shape.dim
    )


def _shape_value(node: onnx.NodeProto, kind: TypeProto) -> NDArray[np.int64]:
    bounds = {each.name: each.i for each in node.attribute}
    return np.array(_dims(kind)[bounds.get("start", 0) : bounds.get("end")], np.int64)


def _runs(inside: Sequence[int], outside: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes of equally many elements in their smallest runs with equal products."""
    first, second = 0, 0
    while first < len(inside) or second < len(outside):
        left, right = [first], [second]
        product, other = inside[first], outside[second]
        while product != other:
            if product < other:
                left.append(left[-1] + 1)
                product *= inside[left[-1]]
            else:
                right.append(right[-1] + 1)
                other *= outside[right[-1]]
        first, second = left[-1] + 1, right[-1] + 1
        yield left, right
