"""Cuts a net by names: torch.fx traces it, and every place where exactly one tensor crosses is a valid cut.

``traced()`` follows the net's forward pass; ``TracedNet.cuts`` lists the places; ``TracedNet.split`` makes head, body
and tail of it. Errors list the cuts that would work.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ensembler.protocol.errors import ConfigError

# What may stand between the answers and the tail's first linear layer: it works on each of P * F numbers alone.
_ELEMENTWISE_MODULES = (nn.Dropout, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity)
_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "setitem"}
)
_ELEMENTWISE_FUNCTIONS = (torch.relu, F.relu, F.gelu, F.silu, torch.tanh)
_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, "relu", "relu_")
LISTED = 12
TRIED_BATCH = 3


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place where one tensor crosses.

    Attributes:
        names: what the options take, the outermost module first; never empty.
        shape: of the tensor, without the batch.
        macs: multiply-accumulate operations of everything before it, for one image.
        share: of the net's operations, 0 to 1.
        parameters: of everything before it.
        relu: whether the tensor comes right out of a ReLU.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    macs: int
    share: float
    parameters: int
    relu: bool

    @property
    def values(self) -> int:
        """How many numbers cross for one image."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class NodeFacts:
    """What running the net once told of one step."""

    shape: tuple[int, ...] | None  # with the batch; None unless a float tensor
    flops: int


class TracedNet:
    """A net as a graph, with the places where it can be cut. Made by ``traced``."""

    def __init__(self, name: str, graph: fx.GraphModule, facts: Sequence[NodeFacts]) -> None:
        self._name = name
        self.module = graph
        self.facts = tuple(facts)
        self._facts = dict(zip(graph.graph.nodes, facts, strict=True))
        self._batch = TRIED_BATCH
        self._nodes = [node for node in graph.graph.nodes if node.op not in ("get_attr", "output")]
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = {
            node: max((self._place(user) for user in node.users), default=self._index[node]) for node in self._nodes
        }
        self._first, self._last = self._named_places()

    # --- what is offered ---

    @property
    def image_size(self) -> tuple[int, int]:
        """H and W of the images that it takes."""
        shape = self._facts[self._nodes[0]].shape
        assert shape is not None  # images are floats
        return shape[2], shape[3]

    @property
    def cuts(self) -> list[Cut]:
        """Every valid end of the head, from the image on."""
        total = sum(fact.flops for fact in self._facts.values())
        found, flops = [], 0
        for index, node in enumerate(self._nodes):
            flops += self._facts[node].flops
            last = index == len(self._nodes) - 1
            if index == 0 or last or self._crossing(index + 1) != [node] or self._shared(index + 1):
                continue
            shape = self._facts[node].shape
            if shape is not None and shape[0] == self._batch:
                macs = flops // (2 * self._batch)
                found.append(
                    Cut(
                        names=self._names_of(index),
                        shape=shape[1:],
                        macs=macs,
                        share=flops / total if total else 0.0,
                        parameters=self._parameters(index + 1),
                        relu=self._is_relu(node),
                    )
                )
        return found

    @property
    def tail_starts(self) -> list[str]:
        """Every module that a tail can start with, one name for each place."""
        starts: dict[int, str] = {}
        for name, place in self._first.items():
            if place > 1 and place not in starts and self._tail_problem(place) is None:
                starts[place] = name
        return [starts[place] for place in sorted(starts)]

    # --- cutting ---

    def split(self, head_end: str, tail_start: str) -> tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule]:
        """Returns head, body and tail; they share the net's parameters.

        Args:
            head_end: the head is everything up to the end of this module.
            tail_start: the tail is everything from the start of this module.

        Raises:
            ConfigError: an unknown name, or a place where the net cannot be cut; the message lists those where it can.
        """
        end, start = self._head_place(head_end), self._tail_place(tail_start)
        if end >= start:
            raise ConfigError(
                f"{self._name}: --head-end {head_end} is not before --tail-start {tail_start}, so nothing is left for "
                f"the server; cut the head earlier; {self._offer()}"
            )
        head, body, tail = self._cut_at([end, start])
        return head, body, tail

    def chain(self, ends: Sequence[str]) -> list[fx.GraphModule]:
        """Returns the net as parts, one after the other, that end where ``ends`` say; the last is the rest.

        Args:
            ends: names of cuts, from the image on.

        Raises:
            ConfigError: as ``split``, or a name that does not come after the one before it.
        """
        places = [self._head_place(name) for name in ends]
        for name, before, after in zip(ends[1:], places, places[1:], strict=False):
            if after <= before:
                raise ConfigError(f"{self._name}: {name} does not come after the cut before it")
        return self._cut_at(places)

    def _cut_at(self, places: Sequence[int]) -> list[fx.GraphModule]:
        edges = [0, *places, len(self._nodes)]
        values = [None, *(self._crossing(place)[0] for place in places), None]
        return [self._part(*step) for step in zip(edges, edges[1:], values, values[1:], strict=False)]

    def _head_place(self, name: str) -> int:
        if name not in self._last:
            raise ConfigError(f"{self._name} has no part {name!r} for --head-end; {self._offer()}")
        place = self._last[name] + 1
        crossing = self._crossing(place)
        if len(crossing) != 1 or crossing[0] is self._nodes[0]:
            raise ConfigError(
                f"{self._name} cannot be cut after {name}: {self._said(crossing)} cross there; {self._offer()}"
            )
        shape = self._facts[crossing[0]].shape
        if shape is None or shape[0] != self._batch:
            raise ConfigError(f"{self._name} cannot be cut after {name}: no batch of floats crosses; {self._offer()}")
        if shared := self._shared(place):
            raise ConfigError(
                f"{self._name} cannot be cut after {name}: {shared} is used on both sides; {self._offer()}"
            )
        return place

    def _tail_place(self, name: str) -> int:
        if name not in self._first:
            raise ConfigError(
                f"{self._name} has no part {name!r} for --tail-start; it can be {_listed(self.tail_starts)}"
            )
        place = self._first[name]
        if problem := self._tail_problem(place):
            raise ConfigError(
                f"{self._name} cannot start its tail at {name}: {problem}; it can be {_listed(self.tail_starts)}"
            )
        return place

    def _offer(self) -> str:
        return f"valid: {_listed([cut.names[0] for cut in self.cuts])} (ensembler cuts lists them all)"

    @staticmethod
    def _said(crossing: Sequence[fx.Node]) -> str:
        return f"{len(crossing)} values ({', '.join(node.name for node in crossing[:4])})" if crossing else "no values"

    def _tail_problem(self, place: int) -> str | None:
        """Returns why no tail can start at ``place``, or None."""
        crossing = self._crossing(place)
        if len(crossing) != 1:
            return f"{self._said(crossing)} cross there"
        shape = self._facts[crossing[0]].shape
        if shape is None or shape[0] != self._batch or len(shape) != 2:
            found = "something else" if shape is None else f"shape {tuple(shape[1:])}"
            return f"a tail takes one vector an image, {found} crosses there"
        if shared := self._shared(place):
            return f"{shared} is used on both sides"
        linear = first_linear(self.module, self._nodes[place:])
        if linear is None:
            return "its first layer with weights is not nn.Linear, which must take P answers side by side"
        if sum(node.op == "call_module" and node.target == linear for node in self._nodes) > 1:
            return f"{linear} is used more than once, and is to be made P times as wide for one of the uses"
        return None

    # --- the graph ---

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.module.get_submodule(str(node.target)), (nn.ReLU, nn.ReLU6))
        return node.op.startswith("call_") and node.target in _RELUS

    def _place(self, node: fx.Node) -> int:
        return self._index.get(node, len(self._nodes))  # the output comes last

    def _crossing(self, place: int) -> list[fx.Node]:
        """Returns the values made before ``place`` and used from there on."""
        return [node for node in self._nodes[:place] if self._last_use[node] >= place]

    def _named_places(self) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the first and the last place of every name: of modules, and of the graph's own steps."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for index, node in enumerate(self._nodes[1:], start=1):
            stack = (node.meta.get("nn_module_stack") or {}).values()
            target = [str(node.target)] if node.op == "call_module" else []
            for name in dict.fromkeys((*(path for path, _ in stack if path), *target, node.name)):
                first.setdefault(name, index)
                last[name] = index
        return first, last

    def _names_of(self, index: int) -> tuple[str, ...]:
        """Returns the names that end here, modules before steps and the outermost first."""
        own = self._nodes[index].name
        modules = [name for name, place in self._last.items() if place == index and name != own]
        modules.sort(key=lambda name: (name.count("."), name))
        known = {name.replace(".", "_") for name in modules}
        steps = [] if own in known or own.removeprefix("_") in known else [own]
        return (*modules, *steps)

    def _tensors(self, nodes: Sequence[fx.Node]) -> dict[int, tuple[str, int]]:
        """Returns {id: (name, size)} of the parameters and buffers that ``nodes`` use."""
        found = {}
        for node in nodes:
            for source in (node, *(n for n in node.all_input_nodes if n.op == "get_attr")):
                if source.op == "call_module":
                    module = self.module.get_submodule(str(source.target))
                    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                        found[id(tensor)] = (f"{source.target}.{name}", tensor.numel())
                elif source.op == "get_attr":
                    tensor = operator.attrgetter(str(source.target))(self.module)
                    found[id(tensor)] = (str(source.target), tensor.numel())
        return found

    def _shared(self, place: int) -> str | None:
        """Returns the name of a parameter that is used before and after ``place``, if there is one."""
        before, after = self._tensors(self._nodes[:place]), self._tensors(self._nodes[place:])
        both = sorted(before[key][0] for key in before.keys() & after.keys())
        return both[0] if both else None

    def _parameters(self, place: int) -> int:
        return sum(size for _, size in self._tensors(self._nodes[:place]).values())

    def _part(self, start: int, end: int, entry: fx.Node | None, exit_node: fx.Node | None) -> fx.GraphModule:
        """Returns the nodes from ``start`` to ``end`` as a module that takes ``entry`` and returns ``exit_node``."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        if entry is not None:
            copies[entry] = graph.placeholder("x")
            if any(_is_in_place(node) for node in self._nodes[start:end]):
                # All bodies are given the same features: none may write into them.
                copies[entry] = graph.call_method("clone", (copies[entry],))

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:  # a constant or parameter: made anew in every part that uses it
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        for node in self._nodes[start:end]:
            copies[node] = graph.node_copy(node, copied)
        if exit_node is None:
            (output,) = (node for node in self.module.graph.nodes if node.op == "output")
            exit_node = output.args[0]
        graph.output(copies[exit_node])
        part = fx.GraphModule(self.module, graph, class_name="Part")
        # Not eliminate_dead_code(): y.mul_(2) looks dead to it when nobody uses what it returns.
        part.delete_all_unused_submodules()
        return part


def traced(
    module: nn.Module,
    name: str,
    image_size: tuple[int, int],
    num_classes: int,
    facts: Sequence[NodeFacts] | None = None,
) -> TracedNet:
    """Follows a net's forward pass.

    Args:
        module: takes images ``(B, 3, H, W)`` float32, returns logits ``(B, K)``.
        name: how errors call it.
        image_size: H and W.
        num_classes: K.
        facts: of an equal net, which saves running this one.

    Raises:
        ConfigError: its path depends on the data or on training mode, it does not take such images, or its output has
            another shape.
    """
    was_training = module.training
    graphs = {}
    try:
        for mode in (True, False):
            graphs[mode] = fx.symbolic_trace(module.train(mode))
    except Exception as error:  # user code, run on stand-ins, may raise anything
        raise ConfigError(
            f"{name} cannot be followed by torch.fx, which cutting needs: {_first_line(error)}. A forward() whose path "
            "depends on the data (if, for, int() on tensors) must be rewritten"
        ) from error
    finally:
        module.train(was_training)
    if _steps(graphs[True]) != _steps(graphs[False]):
        raise ConfigError(
            f"{name}: forward() does different things in training and evaluation (F.dropout or an if on "
            "self.training); use modules such as nn.Dropout, which know their mode"
        )
    graph = _without_in_place(graphs[False])
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise ConfigError(f"{name}: forward() takes {len(placeholders)} arguments; one, the images, is supported")
    # A function may give another net than it did before; what was told of that one is then of no use.
    if facts is not None and len(facts) == len(graph.graph.nodes):
        return TracedNet(name, graph.train(was_training), facts)
    batch = TRIED_BATCH
    recorder = _Recorder(graph.eval())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = recorder.run(torch.zeros(batch, 3, *image_size))
    except Exception as error:  # as above
        raise ConfigError(
            f"{name} does not take images of {image_size[0]}x{image_size[1]} pixels: {_first_line(error)}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (batch, num_classes):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"{name} answers a batch of {batch} images with {shape}, logits of shape ({batch}, {num_classes}) are "
            "needed; does it take num_classes?"
        )
    return TracedNet(name, graph.train(was_training), [recorder.facts[node] for node in graph.graph.nodes])


def first_linear(module: nn.Module, nodes: Sequence[fx.Node]) -> str | None:
    """Returns the name of the linear layer that a tail starts with; None where something else comes before it."""
    for node in nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, nn.Linear):
                return str(node.target)
            if not isinstance(layer, _ELEMENTWISE_MODULES):
                return None
        elif node.op == "placeholder" or (node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS):
            continue
        elif node.op != "get_attr":
            return None
    return None


def widened(tail: fx.GraphModule, num_selected: int) -> fx.GraphModule:
    """Returns a tail for P answers side by side, ``(B, P * F)``: its linear layer is made anew, P times as wide."""
    if num_selected > 1:
        name = first_linear(tail, list(tail.graph.nodes))
        assert name is not None  # split() refuses such tails
        old = tail.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = nn.Linear(num_selected * old.in_features, old.out_features, bias=old.bias is not None)
        tail.set_submodule(name, new)
    return tail


def only_linear(tail: nn.Module) -> nn.Linear:
    """Returns the linear layer that is all of a tail.

    Raises:
        ConfigError: the tail has other layers too.
    """
    assert isinstance(tail, fx.GraphModule)  # as every tail that was cut off
    steps = [node for node in tail.graph.nodes if node.op not in ("placeholder", "output")]
    layer = tail.get_submodule(str(steps[0].target)) if len(steps) == 1 and steps[0].op == "call_module" else None
    if not isinstance(layer, nn.Linear):
        raise ConfigError(
            "--defense joint needs a tail of one linear layer; choose a later --tail-start (ensembler cuts lists them)"
        )
    return layer


def joined(tails: Sequence[nn.Module]) -> nn.Module:
    """Returns the tail ``(B, N * F)`` that gives the mean of the logits of N linear ``tails``.

    Its input is what the selector of Eq. 1 makes of all N answers: each times 1/N, side by side.
    """
    layers = [only_linear(tail) for tail in tails]
    result = copy.deepcopy(tails[0])
    assert isinstance(result, fx.GraphModule)
    layer = only_linear(widened(result, len(tails)))
    with torch.no_grad():
        layer.weight.copy_(torch.cat([each.weight for each in layers], 1))
        if layer.bias is not None:
            layer.bias.copy_(torch.stack([each.bias for each in layers]).mean(0))
    return result


class _Recorder(fx.Interpreter):
    """Runs the net and notes each node's shape and operations."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.facts: dict[fx.Node, NodeFacts] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        floats = isinstance(result, Tensor) and result.dtype == torch.float32 and result.ndim > 0
        self.facts[n] = NodeFacts(tuple(result.shape) if floats else None, counter.get_total_flops())
        return result


def _is_in_place(node: fx.Node) -> bool:
    """Whether a step may write into what it is given: ``x += y``, ``x.relu_()``, ``torch.relu_(x)``."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS
    return node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")


def _without_in_place(graph: fx.GraphModule) -> fx.GraphModule:
    """Has activations return new tensors: what crosses a cut is used by several nets."""
    for module in graph.modules():
        if getattr(module, "inplace", None) is True:
            setattr(module, "inplace", False)  # noqa: B010 (mypy knows no such attribute)
    for node in graph.graph.nodes:
        if node.kwargs.get("inplace") is True:
            node.update_kwarg("inplace", False)
    graph.recompile()
    return graph


def _steps(graph: fx.GraphModule) -> list[tuple[str, str, str, str]]:
    return [(n.op, str(n.target), repr(n.args), repr(n.kwargs)) for n in graph.graph.nodes]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
