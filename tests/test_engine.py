"""One table for all engines: every body answers every row, and nothing that is no such bundle is taken.

An engine has a line in ``BUNDLES``: which server bundle of the tiny run it reads, and what that answers.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import forged_server

from ensembler.cloud_runtime.engine import ENGINES, EngineOptions, load
from ensembler.cloud_runtime.ray_cluster import connected
from ensembler.protocol.errors import BundleError, BundleTamperedError, ConfigError, MissingExtraError
from ensembler.protocol.manifest import load_server

# By kind of engine: the attribute of ``tiny`` that holds its bundle, the fixture of what it answers, and by how many
# codes an answer may differ from that: not all round alike.
BUNDLES = {
    "onnxruntime": ("server", "answers", 0),
    "torch": ("server_torch", "answers_in_float", 1),
    "ray": ("server", "answers", 0),
}
# What an engine imports that not every environment has; and the make target whose environment does.
NEEDS = {"ray": "make test-ray"}

pytestmark = pytest.mark.usefixtures("one_thread")  # the torch engine sets how many torch has


@pytest.fixture(params=BUNDLES, scope="module")
def kind(request):
    if request.param in NEEDS:
        pytest.importorskip(request.param, reason=f"{NEEDS[request.param]} runs it")
    # A Ray takes seconds to start: one for all.
    with connected(None, cores=2) if request.param == "ray" else nullcontext():
        yield request.param


@pytest.fixture(scope="module")
def bundle(tiny, kind):
    return getattr(tiny, BUNDLES[kind][0])


@pytest.fixture(scope="module")
def wanted(kind, request):
    """The answers to ``codes``."""
    return request.getfixturevalue(BUNDLES[kind][1])


@pytest.fixture
def engine(bundle, kind):
    opened = load(bundle, EngineOptions(kind=kind, threads=2))
    yield opened
    opened.close()


def assert_alike(kind, found, expected):
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), expected.astype(int), rtol=0, atol=BUNDLES[kind][2])


def test_every_engine_has_its_line():
    assert BUNDLES.keys() == ENGINES.keys()


@pytest.mark.parametrize("rows", [1, 7, 21])
def test_every_body_answers_every_row(engine, kind, codes, wanted, rows):
    assert_alike(kind, engine.run(codes[:rows]), wanted[:rows])


def test_the_same_codes_get_the_same_answers_alone_and_in_company(engine, kind, codes):
    together = engine.run(codes)
    alone = np.concatenate([engine.run(codes[row : row + 1]) for row in range(len(codes))])
    assert_alike(kind, alone, together)


def test_as_many_batches_as_it_has_lanes_are_computed_at_once(engine, kind, codes, wanted):
    with ThreadPoolExecutor(engine.lanes) as pool:
        for found in pool.map(engine.run, [codes] * 3 * engine.lanes):
            assert_alike(kind, found, wanted)


def test_it_may_be_called_from_one_thread_after_another(engine, kind, codes, wanted):
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for pool in (first, second):
            assert_alike(kind, pool.submit(engine.run, codes).result(60), wanted)


def test_it_says_what_computes_and_that_it_can(engine):
    assert engine.alive()
    assert engine.describe()
    assert "\n" not in engine.describe()


def test_a_tampered_body_is_refused_before_it_is_loaded(bundle, kind, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "server")
    body = folder / load_server(folder).bodies[0]
    body.write_bytes(body.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleTamperedError, match=body.name):
        load(folder, EngineOptions(kind=kind))


def test_nets_that_do_not_compute_what_the_manifest_says_are_refused(bundle, kind, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "server")
    manifest = load_server(folder)
    forged_server(manifest, folder, wire=replace(manifest.wire, answer_width=manifest.wire.answer_width + 1))
    with pytest.raises(BundleError, match="cannot compute"):
        load(folder, EngineOptions(kind=kind))


def test_bodies_that_answer_with_codes_of_more_bits_than_the_manifest_says_are_refused(bundle, kind, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "server")
    manifest = load_server(folder)
    codecs = tuple(replace(codec, bits=2, zero_point=0) for codec in manifest.wire.answer_codecs)
    forged_server(manifest, folder, wire=replace(manifest.wire, answer_codecs=codecs))
    with pytest.raises(BundleError, match="a body answers with codes above 3, which u2 does not have"):
        load(folder, EngineOptions(kind=kind))


def test_an_engine_whose_package_is_missing_names_the_cure(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"needs ray: pip install 'ensembler-edge\[ray\]'"):
        load(tiny.server, EngineOptions(kind="ray"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"address": "host:6379"}, "are of --engine ray, not of auto"),
        ({"kind": "onnxruntime", "replicas": 2}, "are of --engine ray, not of onnxruntime"),
        ({"kind": "ray", "device": "cuda"}, "--device cuda: the Ray engine computes on processors"),
        ({"kind": "ray", "replicas": 0}, "--replicas 0: at least one"),
    ],
)
def test_options_that_an_engine_does_not_have_are_refused(given, reason):
    with pytest.raises(ConfigError, match=reason):
        EngineOptions(**given)


def test_an_engine_that_is_not_there_is_refused(tiny):
    with pytest.raises(ConfigError, match="'abacus' is unknown; known: auto, onnxruntime, torch"):
        load(tiny.server, EngineOptions(kind="abacus"))


@pytest.mark.parametrize(("name", "words"), [("server", "onnxruntime on"), ("server_torch", "torch on")])
def test_unless_told_it_is_the_engine_that_reads_the_bundles_format(tiny, name, words):
    engine = load(getattr(tiny, name), EngineOptions(threads=1))
    assert engine.describe().startswith(words)
    engine.close()


@pytest.mark.parametrize(
    ("name", "kind"), [("server", "torch"), ("server_torch", "onnxruntime"), ("server_torch", "ray")]
)
def test_an_engine_that_does_not_read_the_format_is_refused(tiny, name, kind):
    reader = "onnxruntime" if name == "server" else "torch"
    with pytest.raises(BundleError, match=f"--engine {reader} reads them"):
        load(getattr(tiny, name), EngineOptions(kind=kind))


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_device_that_is_not_there_is_refused(tiny, kind):
    with pytest.raises(ConfigError, match="'abacus' is unknown; known: auto, cpu, cuda"):
        EngineOptions(kind=kind, device="abacus")
    if not torch.cuda.is_available() and kind != "ray":
        with pytest.raises(ConfigError, match="--device cuda: "):
            load(getattr(tiny, BUNDLES[kind][0]), EngineOptions(kind=kind, device="cuda"))
