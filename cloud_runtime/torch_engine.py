"""Runs all N bodies of a torch bundle: separate nets on the CPU, one stacked computation on a GPU.

On the CPU a net is computed by one thread, and the nets are spread over the threads as in the onnxruntime engine. On
CUDA ``torch.func.vmap`` makes one computation of the N nets (a convolution of N nets becomes one with groups), in bf16,
recorded as a CUDA graph for each of a few numbers of rows. **The CUDA path was written without a GPU at hand and has
not been run**; the stacked computation and its arithmetic in bf16 are tested on the CPU.

Nothing of a bundle is code: its program is a list of known operators (protocol/program.py), its tensors are
safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ensembler.cloud_runtime.crew import Crew
from ensembler.cloud_runtime.engine import AUTO, Codes, require_format, usable_cores
from ensembler.protocol import program as programs
from ensembler.protocol.codec import require_codes
from ensembler.protocol.errors import BundleError, ConfigError
from ensembler.protocol.manifest import ServerManifest, load_server
from ensembler.protocol.program import Program

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # rows of a CUDA graph; a batch is filled up to the next, a larger one is divided
CAPTURE_WARM_UPS = 3  # torch asks for a few runs before a capture, in which cuDNN chooses
# What a step may put out for one image. A program of a few lines could ask for any number, and torch would try.
MAX_STEP_VALUES = 1 << 28

Run = Callable[[Sequence[Tensor], Tensor], Tensor]


class TorchEngine:
    """The N bodies of one torch server bundle.

    It sets the number of torch's threads in this process.

    Args:
        bundle: the folder of a server bundle; every file is verified before it is loaded.
        threads: how many nets run at once on the CPU; None takes the machine's usable cores.
        device: one of ``engine.DEVICES``.
        stacked: whether N nets are one computation; None takes what is faster on the device.

    Raises:
        BundleError: missing, damaged, of another version or format, or no program.
        ConfigError: there is no such device, or no thread.
    """

    lanes = 1
    in_process = True

    def __init__(
        self, bundle: Path, *, threads: int | None = None, device: str = AUTO, stacked: bool | None = None
    ) -> None:
        self.manifest: ServerManifest = load_server(bundle)
        require_format(self.manifest, "torch", bundle)
        self.threads = usable_cores() if threads is None else threads
        if self.threads < 1:
            raise ConfigError("an engine needs at least one thread")
        self._device = _device(device)
        on_cuda = self._device.type == "cuda"
        self._stacked = on_cuda if stacked is None else stacked
        wire = self.manifest.wire
        program, tensors = programs.opened(bundle, self.manifest, safetensors.torch.load)
        run = programs.bind(program, torch)
        _require_bounded(run, tensors, wire.feature_shape)
        self._crew = Crew(0 if on_cuda or self._stacked else self.threads - 1)
        torch.set_num_threads(self.threads if self._stacked else 1)
        self._compute: Callable[[Codes], Codes]
        if on_cuda:
            run = programs.bind(program, torch, low=torch.bfloat16)
            nets = [tensor.to(self._device) for tensor in lowered(program, tensors)]
            together = stacked_run(run, nets) if self._stacked else in_turn(run, nets, wire.num_nets)
            self._compute = _CudaGraphs(together, wire.feature_shape, self._device)
        elif self._stacked:
            together = stacked_run(run, tensors)
            self._compute = lambda features: together(torch.tensor(features)).numpy()
        else:
            self._compute = _SeparateNets(run, tensors, wire.num_nets, self.threads, self._crew)

    @torch.inference_mode()
    def run(self, features: Codes) -> Codes:
        """See ``Engine``."""
        wire = self.manifest.wire
        answers = self._compute(features)
        if answers.dtype != np.uint8 or answers.shape != (len(features), wire.num_nets, wire.answer_width):
            raise BundleError(f"the bodies answer with {answers.dtype} of shape {answers.shape}")
        require_codes(answers, wire.answer_codecs[0], "a body")
        return answers

    def alive(self) -> bool:
        """See ``Engine``: it computes in this process, which is alive."""
        return True

    def describe(self) -> str:
        """See ``Engine``."""
        nets = "stacked" if self._stacked else "separate nets"
        where = "CUDA in bf16" if self._device.type == "cuda" else f"{self.threads} threads"
        return f"torch on {where}, {nets}"

    def close(self) -> None:
        """Ends the engine's threads."""
        self._crew.close()


def stacked_run(run: Run, tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns all nets as one computation of ``(B, C, h, w)`` uint8 to ``(B, N, F)`` uint8.

    Args:
        run: of one net.
        tensors: stacked, ``(N, ...)`` each.
    """
    together = torch.func.vmap(run, in_dims=(0, None), out_dims=1)
    nets = list(tensors)
    return lambda codes: together(nets, codes)


def in_turn(run: Run, tensors: Sequence[Tensor], num_nets: int) -> Callable[[Tensor], Tensor]:
    """As ``stacked_run``, one net after another."""
    nets = [[tensor[index] for tensor in tensors] for index in range(num_nets)]
    return lambda codes: torch.stack([run(net, codes) for net in nets], dim=1)


def lowered(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors with the weights of convolutions and products in bf16, so that no run casts them again."""
    weights = programs.lowered_tensors(program)
    return [tensor.bfloat16() if index in weights else tensor for index, tensor in enumerate(tensors)]


# --- parts ---


class _SeparateNets:
    """Every net by itself on one thread, several at once, as ``OnnxEngine`` has it.

    A batch is divided where there are more threads than nets; smaller parts were slower.
    """

    def __init__(self, run: Run, tensors: Sequence[Tensor], num_nets: int, threads: int, crew: Crew) -> None:
        self._run = run
        self._nets = [[_channels_last(tensor[index]) for tensor in tensors] for index in range(num_nets)]
        self._parts = -(-threads // num_nets)
        self._crew = crew

    def __call__(self, features: Codes) -> Codes:
        codes = _channels_last(torch.tensor(features))
        rows = -(-len(features) // self._parts)
        answers: dict[tuple[int, int], Codes] = {}

        def piece(net: int, start: int) -> None:
            with torch.inference_mode():
                answers[net, start] = self._run(self._nets[net], codes[start : start + rows]).numpy()

        starts, nets = range(0, len(features), rows), range(len(self._nets))
        self._crew.run(piece, [(net, start) for start in starts for net in nets])
        return np.stack([np.concatenate([answers[net, start] for start in starts]) for net in nets], axis=1)


class _CudaGraphs:
    """One CUDA graph for each number of rows in ``BUCKETS``; a batch is filled up to the next."""

    def __init__(self, compute: Callable[[Tensor], Tensor], feature_shape: Sequence[int], device: torch.device) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()  # one for all: no two graphs run at once
        with torch.inference_mode(), torch.cuda.device(device):
            for rows in reversed(BUCKETS):
                codes = torch.zeros((rows, *feature_shape), dtype=torch.uint8, device=device)
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(CAPTURE_WARM_UPS):
                        compute(codes)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    answers = compute(codes)
                self._graphs[rows] = graph, codes, answers

    def __call__(self, features: Codes) -> Codes:
        most = BUCKETS[-1]
        parts = [self._part(features[start : start + most]) for start in range(0, len(features), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, features: Codes) -> Codes:
        rows = len(features)
        graph, codes, answers = self._graphs[next(bucket for bucket in BUCKETS if bucket >= rows)]
        codes[:rows].copy_(torch.tensor(features))
        graph.replay()
        found: Codes = answers[:rows].cpu().numpy()  # waits for the graph
        return found


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses a step that puts out more than ``MAX_STEP_VALUES``."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor) and value.numel() > MAX_STEP_VALUES:
                raise BundleError(f"a step of the program puts out {value.numel()} values for one image")
        return result


def _require_bounded(run: Run, tensors: Sequence[Tensor], feature_shape: Sequence[int]) -> None:
    """Runs the program once on shapes alone, before it may allocate anything."""
    nets = [tensor[0].to("meta") for tensor in tensors]
    try:
        with torch.inference_mode(), _Bounded():  # type: ignore[no-untyped-call]
            run(nets, torch.empty((1, *feature_shape), dtype=torch.uint8, device="meta"))
    except Exception as error:  # what torch raises for arguments that do not fit has no common base class
        raise BundleError(f"the bundle's program cannot compute what its manifest says: {error}") from error


def _device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here; leave --device out, or install torch for CUDA"
        )
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def _channels_last(tensor: Tensor) -> Tensor:
    """Returns an image or a filter in the order in which the CPU's convolutions are faster."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.contiguous()
