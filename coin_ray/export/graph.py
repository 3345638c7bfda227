"""Nodes of an ONNX graph, one after the other; tensors are known by their names. Needs
the extra ``export``.
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


class Graph:
    """Collects nodes; ``f32``, ``f64`` and ``i64`` make constants."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._names = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output; returns the output's name. An input "" is left out."""
        return self.op_many(kind, 1, *inputs, **attributes)[0]

    def op_many(
        self, kind: str, outputs: int, *inputs: str, **attributes: Any
    ) -> list[str]:
        names = [self._name(kind) for _ in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def f32(self, *values: float) -> str:
        return self.constant(np.array(values, np.float32))

    def f64(self, *values: float) -> str:
        return self.constant(np.array(values, np.float64))

    def i64(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        return self.constant(np.array(value, np.int64))

    def scalar_f32(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def constant(self, value: NDArray[Any]) -> str:
        name = self._name("constant")
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def cast(self, tensor: str, kind: int) -> str:
        return self.op("Cast", tensor, to=kind)

    def part(self, tensor: str, start: int, end: int, axis: int) -> str:
        """tensor[..., start:end, ...] along one axis."""
        return self.op("Slice", tensor, self.i64(start), self.i64(end), self.i64(axis))

    def choose(
        self,
        condition: str,
        then: Callable[[], str],
        otherwise: Callable[[], str],
        kind: int,
        shape: Sequence[int | None],
    ) -> str:
        """What ``then`` makes where the scalar ``condition`` holds, else what
        ``otherwise`` makes; the other one is not computed.
        """
        branches = {
            name: self._branch(make, kind, shape)
            for name, make in (("then_branch", then), ("else_branch", otherwise))
        }
        return self.op("If", condition, **branches)

    def _branch(
        self, make: Callable[[], str], kind: int, shape: Sequence[int | None]
    ) -> GraphProto:
        before, self._nodes = self._nodes, []
        name, end = self._name("branch"), self._name("end")
        self._nodes.append(helper.make_node("Identity", [make()], [end]))
        own, self._nodes = self._nodes, before
        return helper.make_graph(
            own, name, [], [helper.make_tensor_value_info(end, kind, shape)]
        )

    def network(self, prefix: str, model: ModelProto, *inputs: str) -> list[str]:
        """All nodes of another model, fed with ``inputs`` in its order; returns the
        names of its outputs.
        """
        inner = compose.add_prefix(model, f"{prefix}/").graph
        for name, given in zip(inner.input, inputs, strict=True):
            self._nodes.append(helper.make_node("Identity", [given], [name.name]))
        self._nodes.extend(inner.node)
        self._constants.extend(inner.initializer)
        return [output.name for output in inner.output]

    def model(
        self,
        name: str,
        inputs: Sequence[ValueInfoProto],
        outputs: dict[str, ValueInfoProto],
    ) -> ModelProto:
        """The checked model; ``outputs`` says which tensor becomes which output."""
        ends = [
            helper.make_node("Identity", [tensor], [info.name])
            for tensor, info in outputs.items()
        ]
        graph = helper.make_graph(
            [*self._nodes, *ends],
            name,
            list(inputs),
            list(outputs.values()),
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

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}_{self._names}"
