"""Makes the golden bundles that later versions must go on reading: tests/golden/v1, and v1_tflite with both formats.

    python tools/golden_bundle.py tests/golden/v1
    python tools/golden_bundle.py tests/golden/v1_tflite onnx tflite

The smallest net that has everything (a cut behind a shortcut, a bottleneck, 4-bit answers, two operators), trained for
a moment on noise of three colours. It is made once for each version of the bundle format and then never again: a
golden bundle that is made anew proves nothing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import cast

import numpy as np

from ensembler.client import EdgeClient
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.export.parity import Gates
from ensembler.export.pipeline import ExportOptions, export
from ensembler.protocol.manifest import ModelFormat
from ensembler.protocol.messages import RESULT, Message, decode, encode
from ensembler.training.config import TrainConfig
from ensembler.training.stages import train
from ensembler.transport.base import Frames
from ensembler.transport.inprocess import Handler, InProcessTransport

PARTIES = 2


def main() -> None:
    """Makes the folder; refuses one that exists."""
    target, formats = Path(sys.argv[1]), cast("tuple[ModelFormat, ...]", tuple(sys.argv[2:] or ["onnx"]))
    if target.exists():
        raise SystemExit(f"{target} exists: a golden bundle is not made anew")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # own_nets, and images of noise
    from conftest import LABELS, colour_images

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part, count, seed in (("train", 192, 1), ("test", 64, 2)):
            x, y = colour_images(count, seed)
            np.savez(folder / f"{part}.npz", x=x, y=y, label_names=np.array(LABELS))
        config = TrainConfig(
            data=f"npz:{folder / 'train.npz'},{folder / 'test.npz'}",
            arch="own_nets:skipping",
            head_end="add",
            tail_start="gelu",
            bottleneck=(4, 2, 2),
            answer_bits=4,
            num_nets=3,
            num_selected=2,
            epochs_stage1=2,
            epochs_stage3=2,
            batch_size=16,
            learning_rate=0.05,
        )
        train(config, folder / "run")
        gates = Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)
        options = ExportOptions(parties=PARTIES, formats=formats, gates=gates)
        export(folder / "run", folder / "out", options)
        target.mkdir(parents=True)
        for name in ("client", *(f"server_{index}" for index in range(PARTIES))):
            shutil.copytree(folder / "out" / name, target / name)
    pixels = np.ascontiguousarray(colour_images(4, 3)[0].transpose(0, 2, 3, 1))
    np.savez(target / "expected.npz", images=pixels, logits=predicted(target, pixels))


def predicted(folder: Path, pixels: np.ndarray, backend: str = "onnxruntime") -> np.ndarray:
    """Returns the logits of the golden client with its servers, without a network."""
    engines = [OnnxEngine(folder / f"server_{index}", threads=1) for index in range(PARTIES)]

    def handler(engine: OnnxEngine) -> Handler:
        def handle(frames: Frames) -> list[Frames]:
            message = decode(frames)
            assert message.tensor is not None
            answers = engine.run(message.tensor)
            bits = engine.manifest.wire.answer_bits
            reply = Message(
                operation=RESULT,
                request_id=message.request_id,
                bodies_id=message.bodies_id,
                tensor=answers,
                bits=bits,
            )
            return [encode(reply)]

        return handle

    transports = [InProcessTransport(handler(engine)) for engine in engines]
    addresses = [f"party {index}" for index in range(PARTIES)]
    with EdgeClient(folder / "client", addresses, backend=backend, transport=transports) as client:
        logits = np.stack([prediction.logits for prediction in client.predict_batch(list(pixels))])
    for engine in engines:
        engine.close()
    return logits


if __name__ == "__main__":
    main()
