"""Makes edge_runtime/probe.onnx and probe.tflite: one int8 head of random weights, for ``ensembler doctor``.

    python tools/probe_models.py

Needs the extra ``tflite``. Prints the digest of each runtime's codes, which stand in edge_runtime/probe.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ensembler.edge_runtime import probe
from ensembler.edge_runtime.backends import BACKENDS, installed
from ensembler.export import graphs, tflite
from ensembler.export.client_models import FEATURES, IMAGE, PIXEL_CODEC
from ensembler.protocol.codec import AffineCodec

FOLDER = Path(__file__).resolve().parent.parent / "edge_runtime"


class _ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = self.inner(image.permute(0, 3, 1, 2))
        return codes


def main() -> None:
    """Writes both models."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    images = torch.from_numpy(PIXEL_CODEC.decode(pixels))
    x = images.permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        codec = AffineCodec.from_range(0.0, float(net(x).max()))
        graph = graphs.optimised(graphs.from_torch(net, [x[:2]]))
        graph = graphs.quantised(graph, {graphs.INPUT: x.numpy()}, input_codec=PIXEL_CODEC, output_codec=codec)
        graph = graphs.attach_codes(graph, IMAGE, PIXEL_CODEC, output=FEATURES, out_codec=codec)
        (FOLDER / "probe.onnx").write_bytes(graphs.scrubbed(graphs.channels_last(graph, IMAGE)))
        in_float = tflite.from_torch(_ChannelsLast(net).eval(), [images[:1]], inputs=[IMAGE], output=FEATURES)
        codecs = {IMAGE: PIXEL_CODEC, FEATURES: codec}
        (FOLDER / "probe.tflite").write_bytes(
            tflite.scrubbed(tflite.quantised(in_float, {IMAGE: images.numpy()}, codecs=codecs))
        )
    for backend in filter(installed, BACKENDS):
        print(probe.run(backend))


if __name__ == "__main__":
    main()
