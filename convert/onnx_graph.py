"""Nodes and initialisers of an ONNX graph in the making."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np


class OnnxGraph:
    """Nodes and initialisers in the making; values go by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []
        self._scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix of the names of what is made inside."""
        before, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = before

    def ops(
        self, kind: str, *inputs: str, outputs: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node; the names of its outputs."""
        from onnx import helper

        self._count += 1
        name = name or f"{self._scope}{kind.lower()}.{self._count}"
        names = [name] if outputs == 1 else [f"{name}.{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node of one output; its name."""
        return self.ops(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def constant(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        """Name of an initialiser; equal ones are stored once, unless they have their own name."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if not name and key in self._constants:
            return self._constants[key]
        if not name:
            name = self._constants[key] = f"constant.{len(self._constants)}"
        self.initialisers.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(values, np.int64)

    def reshape(self, x: str, *shape: int) -> str:
        """The same elements in another shape; -1: whatever is left."""
        return self.op("Reshape", x, self.ints(*shape))

    def cut(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        """x[start:stop:step] along one axis."""
        ints = (self.ints(value) for value in (start, stop, axis, step))
        return self.op("Slice", x, *ints)

    def power(self, x: str, exponent: float) -> str:
        """The exponent of x, as a product where that is exact."""
        if exponent == 1:
            return x
        return self.op("Mul", x, x) if exponent == 2 else self.op("Pow", x, self.constant(exponent))
