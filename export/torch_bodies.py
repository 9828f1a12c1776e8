"""The N bodies as one program and its stacked tensors: the torch format of a server bundle.

``torch.export`` traces the first body between its codecs, the batch free. Batch norms are folded into the convolutions
before them, as in the ONNX graphs, and what is left becomes a ``Program`` (protocol/program.py). The nets differ in
their tensors alone, so each tensor is written once, with N on its first axis. Start reading at ``write``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ensembler.edge_runtime.backends import Session
from ensembler.export.graphs import quiet
from ensembler.protocol import program as programs
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ExportError
from ensembler.protocol.manifest import ServerManifest, WireSpec
from ensembler.protocol.program import Call, DType, Program, Value

FILES = ("bodies.json", "bodies.safetensors")

# An operator that changes nothing in a net that only answers; in any other form than its first argument's.
_NOTHING = frozenset(
    {"clone.default", "contiguous.default", "alias.default", "detach.default", "lift_fresh_copy.default"}
)
# With a copy left out, a view may need one.
_RENAMED = {"view.default": "reshape.default", "_unsafe_view.default": "reshape.default"}
_INTEGERS = {
    operator.getitem: "getitem",
    operator.add: "integer_add",
    operator.sub: "integer_sub",
    operator.mul: "integer_mul",
    operator.floordiv: "integer_floordiv",
}
_WHERE = frozenset({"memory_format", "layout", "device", "pin_memory", "non_blocking"})
_CONVOLUTIONS = frozenset({"conv1d.default", "conv2d.default", "conv3d.default"})
_BATCH_NORM = "_native_batch_norm_legit_no_training.default"


def write(folder: Path, bodies: Sequence[nn.Module], wire: WireSpec) -> tuple[str, ...]:
    """Writes both files into ``folder``.

    Args:
        folder: exists.
        bodies: N, in eval mode, of one architecture.
        wire: their codecs, in the same order.

    Returns:
        The names of the files.

    Raises:
        ExportError: torch cannot export the bodies, a program has no such operator, or their architectures differ.
    """
    program, tensors = from_torch(bodies, wire)
    stacked = dict(zip(program.tensor_names(), tensors, strict=True))
    (folder / FILES[0]).write_bytes(programs.to_json(program))
    (folder / FILES[1]).write_bytes(safetensors.torch.save(stacked))
    return FILES


def sessions(folder: Path, manifest: ServerManifest) -> list[Session]:
    """Opens each net of a torch bundle by itself.

    Args:
        folder: of the bundle, verified.
        manifest: of it.

    Raises:
        BundleError: the files are no program, or not its tensors.
    """
    program, stacked = programs.opened(folder, manifest, safetensors.torch.load)
    run = programs.bind(program, torch)
    return [_Net(run, [tensor[index] for tensor in stacked]) for index in range(manifest.wire.num_nets)]


@torch.inference_mode()
def from_torch(bodies: Sequence[nn.Module], wire: WireSpec) -> tuple[Program, list[Tensor]]:
    """Returns the program of the bodies, and its tensors, each ``(N, ...)``."""
    coded = [
        _Coded(body, wire.feature_codec, codec).eval() for body, codec in zip(bodies, wire.answer_codecs, strict=True)
    ]
    exported = _exported(coded[0], wire.feature_shape)
    states = [_state(net) for net in coded]
    graph = _Graph(exported.graph)
    tensors: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            graph.codes = spec.arg.name
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target:
            constant = exported.constants.get(spec.target)
            tensors[spec.arg.name] = _stacked(spec.target, states, constant)
        else:
            raise ExportError(f"a net with {spec.kind.name.lower()} as an input cannot be exported to --format torch")
    graph.fold(tensors)
    return graph.program(tensors)


class _Coded(nn.Module):
    """A body between its codecs, ``(B, C, h, w)`` uint8 to ``(B, F)`` uint8.

    The features' codec is one for all nets, and a constant; the answer's is a tensor, since each net has its own.
    """

    def __init__(self, body: nn.Module, features: AffineCodec, answer: AffineCodec) -> None:
        super().__init__()
        self.body = body
        self._features = features
        self._code_max = answer.code_max
        # One axis, so that an answer of fewer bits becomes float32 where it meets them.
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", torch.tensor([answer.scale]))
        self.register_buffer("zero_point", torch.tensor([float(answer.zero_point)]))

    def forward(self, codes: Tensor) -> Tensor:
        features = (codes.to(torch.float32) - float(self._features.zero_point)) * self._features.scale
        answer: Tensor = self.body(features)
        codes = torch.round(answer / self.scale) + self.zero_point
        return codes.clamp(0.0, float(self._code_max)).to(torch.uint8)


class _Net:
    """One net of a bundle, as the parity report runs it: in float32."""

    def __init__(self, run: Callable[[Sequence[Tensor], Tensor], Tensor], tensors: Sequence[Tensor]) -> None:
        self._run = run
        self._tensors = tensors

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[Any]:
        """See ``Session``."""
        return self._run(self._tensors, torch.tensor(inputs["features"])).numpy()


def _exported(net: nn.Module, feature_shape: Sequence[int]) -> ExportedProgram:
    example = torch.zeros((2, *feature_shape), dtype=torch.uint8)
    try:
        with quiet():
            exported = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            # Nothing is decomposed but what writes in place: vmap knows linear, conv2d and attention as they are.
            functional: ExportedProgram = exported.run_decompositions({})
            return functional
    except Exception as error:  # the exporter has no common base class
        raise ExportError(f"torch cannot export the body: {error}") from error


def _state(net: nn.Module) -> dict[str, Tensor]:
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    return {name: value.detach().cpu() for name, value in named}


def _stacked(name: str, states: Sequence[Mapping[str, Tensor]], constant: Tensor | None) -> Tensor:
    """Returns one tensor of all nets; a constant of ``forward`` is in no net's state and equal in all."""
    try:
        found = [state[name] if constant is None or name in state else constant for state in states]
        return torch.stack(found)
    except (KeyError, RuntimeError) as error:
        raise ExportError(f"the nets have not all the same {name}: a bundle's bodies have one architecture") from error


class _Graph:
    """What torch traced, on its way to a ``Program``."""

    def __init__(self, graph: fx.Graph) -> None:
        self.codes = ""
        self._output: fx.Node | None = None
        self._calls: list[fx.Node] = []
        self._aliases: dict[fx.Node, fx.Node] = {}
        self._biases: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "output":
                (self._output,) = node.args[0]
            elif node.op == "call_function":
                self._add(node)

    def _add(self, node: fx.Node) -> None:
        name = _name(node)
        if name in _NOTHING:
            self._aliases[node] = self._meant(_node(node.args[0]))
        elif not name.startswith("_assert"):
            self._calls.append(node)

    def _meant(self, node: fx.Node) -> fx.Node:
        return self._aliases.get(node, node)

    def fold(self, tensors: dict[str, Tensor]) -> None:
        """Multiplies batch norms into the convolutions before them, in the tensors of every net."""
        for norm in list(self._calls):
            if _name(norm) != _BATCH_NORM:
                continue
            convolution = self._meant(_node(norm.args[0]))
            (result, *others) = norm.users
            weight = convolution.args[1] if len(convolution.args) > 1 else None
            if (
                _name(convolution) not in _CONVOLUTIONS
                or len(convolution.users) != 1
                or others
                or not isinstance(weight, fx.Node)
                or len(weight.users) != 1
            ):
                continue
            bias = convolution.args[2] if len(convolution.args) > 2 else None
            if isinstance(bias, fx.Node) and len(bias.users) != 1:
                continue
            scale, shift, mean, variance = (tensors[_node(argument).name] for argument in norm.args[1:5])
            epsilon = float(norm.args[6])  # type: ignore[arg-type]
            of_nets = zip(
                tensors[weight.name],
                [None] * len(scale) if bias is None else tensors[_node(bias).name],
                *(mean, variance, scale, shift),
                strict=True,
            )
            folded = [fuse_conv_bn_weights(w, b, m, v, epsilon, g, s) for w, b, m, v, g, s in of_nets]
            tensors[weight.name] = torch.stack([each.data for each, _ in folded])
            self._biases[convolution] = bias_name = f"{convolution.name} bias"
            tensors[bias_name] = torch.stack([each.data for _, each in folded])
            self._aliases[norm] = self._aliases[result] = convolution
            self._calls = [node for node in self._calls if node not in (norm, result)]

    def program(self, tensors: Mapping[str, Tensor]) -> tuple[Program, list[Tensor]]:
        """Returns the program and the tensors that it uses, in the order of their first use."""
        order: dict[str, int] = {}
        for node in self._calls:
            names = [self._meant(each).name for each in node.all_input_nodes]
            for name in (*names, self._biases.get(node, "")):
                if name in tensors:
                    order.setdefault(name, len(order) + 1)
        values: dict[str, int] = {self.codes: programs.CODES} | order
        calls = []
        for node in self._calls:
            calls.append(self._call(node, values))
            values[node.name] = len(order) + len(calls)
        if self._output is None:
            raise ExportError("the body has no answer")
        output = values[self._meant(self._output).name]
        return Program(len(order), tuple(calls), output), [tensors[name].contiguous() for name in order]

    def _call(self, node: fx.Node, values: Mapping[str, int]) -> Call:
        name = _name(node)
        name = _RENAMED.get(name, name)
        if name not in programs.OPERATORS:
            raise ExportError(f"--format torch has no operator {name}, which a body uses; take --format onnx")
        arguments = list(node.args)
        if node in self._biases:
            arguments[2:3] = []
        read = [self._argument(argument, values) for argument in arguments]
        if node in self._biases:
            read.insert(2, Value(values[self._biases[node]]))
        given = {key: value for key, value in node.kwargs.items() if key not in _WHERE and value is not None}
        if not given.keys() <= programs.OPTIONS:
            raise ExportError(f"--format torch has no option {', '.join(given)} of {name}; take --format onnx")
        return Call(name, tuple(read), {key: self._argument(value, values) for key, value in given.items()})

    def _argument(self, argument: Any, values: Mapping[str, int]) -> Any:
        if isinstance(argument, fx.Node):
            return Value(values[self._meant(argument).name])
        if isinstance(argument, list | tuple):
            return tuple(self._argument(item, values) for item in argument)
        if isinstance(argument, torch.dtype):
            return DType(str(argument).removeprefix("torch."))
        if argument is None or isinstance(argument, bool | int | float | str):
            return argument
        raise ExportError(f"--format torch cannot say {argument!r}, which a body's graph holds; take --format onnx")


def _node(argument: Any) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise ExportError(f"--format torch expected a tensor in a body's graph and found {argument!r}")
    return argument


def _name(node: fx.Node) -> str:
    """Returns the operator's name in a program, or how torch calls what no program has."""
    if node.op != "call_function":
        return node.op
    if node.target in _INTEGERS:
        return _INTEGERS[node.target]
    return str(node.target).removeprefix("aten.")
