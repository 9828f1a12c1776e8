"""Which engine, and which arrangement of N nets, is faster: all of them side by side in one run.

    python benchmarks/engines.py --arch resnet10_slim --arch resnet18

Bodies of random weights are written as server bundles (ONNX in int8 and in float32, torch) and opened in every engine;
time does not depend on what weights say. The ways, interleaved call by call, so that a noisy machine is noisy for all:

* ``int8``, ``float32``: the onnxruntime engine on the ONNX bundles;
* ``separate``: the torch engine with every net by itself, as it computes on the CPU;
* ``stacked``: the torch engine with N nets as one computation, as it computes on a GPU.

A ratio is the median over the rounds of a way's time by that of ``separate`` in the same round. Without a GPU nothing
here says how the nets are to be arranged on one; ``--device cuda`` is for a machine that has it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import results
import torch
from overhead import timed
from torch import nn

from ensembler.cloud_runtime.engine import DEVICES, Engine, warm_up
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.torch_engine import TorchEngine
from ensembler.export import pipeline
from ensembler.export.parity import Gates
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.manifest import WireSpec
from ensembler.training.architectures import ARCHITECTURES
from ensembler.training.splits import traced

BATCHES = (1, 8, 64)
IMAGE = (32, 32)
CALIBRATION = 256


def bodies_of(arch: str, num_nets: int) -> list[nn.Module]:
    """Returns N bodies of an architecture as Ensembler cuts it, with random weights."""
    found = []
    for _ in range(num_nets):
        architecture = ARCHITECTURES[arch]
        net = traced(architecture.build(IMAGE, 10, True).eval(), IMAGE)
        found.append(net.split(architecture.head_end, architecture.tail_start).body.eval())
    return found


@torch.inference_mode()
def wire_of(bodies: list[nn.Module], samples: torch.Tensor) -> WireSpec:
    """Returns codecs that fit the bodies."""
    answers = [body(samples) for body in bodies]
    return WireSpec(
        bodies_id="0" * 64,
        feature_shape=tuple(samples.shape[1:]),
        feature_codec=AffineCodec.from_range(float(samples.min()), float(samples.max())),
        answer_width=answers[0].shape[1],
        answer_codecs=tuple(AffineCodec.from_range(float(each.min()), float(each.max())) for each in answers),
    )
