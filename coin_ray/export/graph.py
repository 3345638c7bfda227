"""Build an ONNX graph node by node; tensors are referred to by their names. Needs the
extra ``export``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    checker,
    compose,
    helper,
    numpy_helper,
)

OPSET = 18


class OnnxGraph:
    """Collects nodes; ``f32``, ``f64`` and ``i64`` make constants. Each method that adds
    a node returns the name of its output.
    """

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._name_count = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output. An input "" is left out."""
        return self.op_many(kind, 1, *inputs, **attributes)[0]

    def op_many(
        self, kind: str, output_count: int, *inputs: str, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; return their names."""
        names = [self._new_name(kind) for _ in range(output_count)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def f32(self, *numbers: float) -> str:
        return self.constant(np.array(numbers, np.float32))

    def f64(self, *numbers: float) -> str:
        return self.constant(np.array(numbers, np.float64))

    def i64(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def scalar(self, number: int) -> str:
        return self.constant(np.array(number, np.int64))

    def scalar_f32(self, number: float) -> str:
        return self.constant(np.array(number, np.float32))

    def constant(self, array: NDArray[Any]) -> str:
        name = self._new_name("constant")
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def cast(self, tensor: str, kind: int) -> str:
        return self.op("Cast", tensor, to=kind)

    def slice_axis(self, tensor: str, start: int, end: int, axis: int) -> str:
        """Add tensor[..., start:end, ...] along one axis."""
        return self.op("Slice", tensor, self.i64(start), self.i64(end), self.i64(axis))

    def squeeze(self, tensor: str, *axes: int) -> str:
        """Remove these axes of length 1; all of them if none is named."""
        if not axes:
            return self.op("Squeeze", tensor)
        return self.op("Squeeze", tensor, self.i64(*axes))

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        return self.op("Unsqueeze", tensor, self.i64(*axes))

    def concat(self, *tensors: str, axis: int) -> str:
        return self.op("Concat", *tensors, axis=axis)

    def arange(self, count: str) -> str:
        """Add 0, 1, ... count - 1 as int64, for a length [1]."""
        start, limit = self.scalar(0), self.squeeze(count)
        return self.op("Range", start, limit, self.scalar(1))

    def if_else(
        self,
        condition: str,
        add_then: Callable[[], str],
        add_else: Callable[[], str],
        kind: int,
        shape: Sequence[int | None],
    ) -> str:
        """Add a choice by a scalar ``condition`` between what two functions add; only
        the chosen branch is computed.
        """
        then_branch = self._branch(add_then, kind, shape)
        else_branch = self._branch(add_else, kind, shape)
        return self.op(
            "If", condition, then_branch=then_branch, else_branch=else_branch
        )

    def _branch(
        self, add_nodes: Callable[[], str], kind: int, shape: Sequence[int | None]
    ) -> GraphProto:
        outer_nodes, self._nodes = self._nodes, []
        name, end = self._new_name("branch"), self._new_name("end")
        self._nodes.append(helper.make_node("Identity", [add_nodes()], [end]))
        branch_nodes, self._nodes = self._nodes, outer_nodes
        end_info = helper.make_tensor_value_info(end, kind, shape)
        return helper.make_graph(branch_nodes, name, [], [end_info])

    def embed(self, prefix: str, model: ModelProto, *inputs: str) -> list[str]:
        """Add all nodes of another model, fed with ``inputs`` in its order; return the
        names of its outputs.
        """
        inner = compose.add_prefix(model, f"{prefix}/").graph
        for inner_input, tensor in zip(inner.input, inputs, strict=True):
            node = helper.make_node("Identity", [tensor], [inner_input.name])
            self._nodes.append(node)
        self._nodes.extend(inner.node)
        self._constants.extend(inner.initializer)
        return [tensor.name for tensor in inner.output]

    def build(
        self,
        name: str,
        inputs: Sequence[ValueInfoProto],
        outputs_by_tensor: dict[str, ValueInfoProto],
    ) -> ModelProto:
        """Return the checked model; ``outputs_by_tensor`` says which tensor becomes
        which output.
        """
        ends = [
            helper.make_node("Identity", [tensor], [value_info.name])
            for tensor, value_info in outputs_by_tensor.items()
        ]
        graph = helper.make_graph(
            [*self._nodes, *ends],
            name,
            list(inputs),
            list(outputs_by_tensor.values()),
            self._constants,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=9,
            producer_name="coin-ray",
        )
        checker.check_model(model, full_check=True)
        return model

    def _new_name(self, kind: str) -> str:
        self._name_count += 1
        return f"{kind}_{self._name_count}"
