"""What earlier versions made is still read; what later ones make is refused by its version."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ensembler.client import EdgeClient
from ensembler.edge_runtime.backends import BACKENDS
from ensembler.protocol.errors import BundleVersionError
from ensembler.protocol.manifest import load_client, load_server

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = sorted((ROOT / "tests" / "golden").iterdir())
golden_table = pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def predicted():
    """tools/golden_bundle.py's way of asking a golden client."""
    specification = importlib.util.spec_from_file_location("golden_bundle", ROOT / "tools" / "golden_bundle.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.predicted


@golden_table
@pytest.mark.parametrize("backend", ["onnxruntime", "ai-edge-litert"])
def test_a_golden_bundle_is_read_and_answers_as_it_did(golden, backend, predicted):
    if BACKENDS[backend].format not in {pair.format for pair in load_client(golden / "client").models}:
        pytest.skip("not among this bundle's formats")
    with np.load(golden / "expected.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    found = predicted(golden, images, backend)
    # Other processors and runtimes may round differently; a wrong codec, order or selector would be far off.
    np.testing.assert_allclose(found, logits, atol=0.05 * np.abs(logits).max())
    assert (found.argmax(1) == logits.argmax(1)).all()


@golden_table
def test_a_golden_bundle_is_served_over_the_network(golden, serve):
    with np.load(golden / "expected.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    with (
        serve(golden / "server_0", "--plaintext") as (first, _),
        serve(golden / "server_1", "--plaintext") as (second, _),
        EdgeClient(golden / "client", [first, second], plaintext=True, timeout_ms=60_000) as client,
    ):
        labels = [prediction.label for prediction in client.predict_batch(list(images))]
    assert labels == [("red", "grün", "blue")[i] for i in logits.argmax(1)]


@golden_table
@pytest.mark.parametrize("part", ["client", "server_0"])
def test_a_bundle_of_a_later_version_is_refused_with_both_versions(golden, part, tmp_path):
    bundle = tmp_path / part
    shutil.copytree(golden / part, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"version": 99}), encoding="utf-8")
    load = load_client if part == "client" else load_server
    with pytest.raises(BundleVersionError, match="has bundle version 99, this package reads version 1"):
        load(bundle)


@golden_table
def test_a_field_that_a_later_version_may_add_is_ignored(golden, tmp_path):
    shutil.copytree(golden / "client", tmp_path / "client")
    path = tmp_path / "client" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"new": {"deep": 1}}), encoding="utf-8")
    assert load_client(tmp_path / "client") == load_client(golden / "client")
