"""The engine: all N answers for every row, the same whatever the threads and parts."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

from ensembler.cloud_runtime.engine import OnnxEngine, _Crew
from ensembler.protocol.errors import BundleError, BundleTamperedError, ConfigError
from ensembler.protocol.manifest import MANIFEST_NAME, ServerManifest, describe_file, load_server, to_json


@pytest.fixture(scope="module")
def codes(tiny):
    shape = load_server(tiny.server).wire.feature_shape
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (21, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def answers(tiny, codes):
    """What the bodies answer when their sessions are called one by one."""
    manifest = load_server(tiny.server)
    nets = [ort.InferenceSession(str(tiny.server / name)) for name in manifest.bodies]
    return np.stack([net.run(None, {"features": codes})[0] for net in nets], axis=1)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("part_rows", [1, 8, 100])
def test_every_body_answers_every_row_whatever_the_threads_and_parts(tiny, codes, answers, threads, part_rows):
    engine = OnnxEngine(tiny.server, threads=threads, part_rows=part_rows)
    for rows in (1, 7, 21):
        np.testing.assert_array_equal(engine.run(codes[:rows]), answers[:rows])
    engine.close()


def test_the_engine_makes_no_more_threads_than_its_budget(tiny):
    before = threading.active_count()
    engine = OnnxEngine(tiny.server, threads=3)
    assert threading.active_count() - before == 2  # the caller is the third
    engine.close()
    assert threading.active_count() == before


def test_an_engine_without_threads_is_refused(tiny):
    with pytest.raises(ConfigError, match="thread"):
        OnnxEngine(tiny.server, threads=0)


def test_a_tampered_body_is_refused_before_it_is_loaded(tiny, tmp_path):
    folder = shutil.copytree(tiny.server, tmp_path / "server")
    body = folder / load_server(folder).bodies[0]
    body.write_bytes(body.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleTamperedError, match=body.name):
        OnnxEngine(folder, threads=1)


def forged(manifest: ServerManifest, folder, **changes) -> None:
    """Writes a manifest whose digests are right and whose contents are not."""
    files = {name: describe_file(folder / name) for name in manifest.files}
    fields = {name: getattr(manifest, name) for name in ("wire", "precision", "bodies")}
    (folder / MANIFEST_NAME).write_bytes(to_json(ServerManifest(**(fields | {"files": files} | changes))))


def test_a_file_that_is_no_graph_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny.server, tmp_path / "server")
    manifest = load_server(folder)
    (folder / manifest.bodies[1]).write_bytes(b"not a graph")
    forged(manifest, folder)
    with pytest.raises(BundleError, match="onnxruntime"):
        OnnxEngine(folder, threads=1)


def test_warming_up_refuses_graphs_that_do_not_compute_what_the_manifest_says(tiny, tmp_path):
    from dataclasses import replace

    folder = shutil.copytree(tiny.server, tmp_path / "server")
    manifest = load_server(folder)
    forged(manifest, folder, wire=replace(manifest.wire, answer_width=manifest.wire.answer_width + 1))
    engine = OnnxEngine(folder, threads=1)
    with pytest.raises(BundleError, match="cannot compute"):
        engine.warm_up()
    engine.close()


def test_bodies_that_answer_with_codes_of_more_bits_than_the_manifest_says_are_refused(tiny, tmp_path, codes):
    from dataclasses import replace

    folder = shutil.copytree(tiny.server, tmp_path / "server")
    manifest = load_server(folder)
    codecs = tuple(replace(codec, bits=2, zero_point=0) for codec in manifest.wire.answer_codecs)
    forged(manifest, folder, wire=replace(manifest.wire, answer_codecs=codecs))
    engine = OnnxEngine(folder, threads=1)
    with pytest.raises(BundleError, match="a body answers with codes above 3, which u2 does not have"):
        engine.run(codes)
    engine.close()


def test_warming_up_a_good_bundle_says_nothing(tiny):
    engine = OnnxEngine(tiny.server, threads=2)
    engine.warm_up()
    engine.close()


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_a_crew_does_every_piece_once(helpers):
    crew, done, lock = _Crew(helpers), [], threading.Lock()

    def work(a, b):
        with lock:
            done.append((a, b))

    pieces = [(a, b) for a in range(10) for b in range(10)]
    for _ in range(50):
        done.clear()
        crew.run(work, pieces)
        assert sorted(done) == pieces
    crew.close()


@pytest.mark.parametrize("helpers", [0, 2])
def test_an_error_in_a_piece_is_raised_and_the_crew_works_on(helpers):
    crew = _Crew(helpers)

    def work(a, b):
        if a == 3:
            raise ValueError("piece three")

    with pytest.raises(ValueError, match="piece three"):
        crew.run(work, [(a, 0) for a in range(8)])
    crew.run(lambda a, b: None, [(0, 0), (1, 0)])
    crew.close()


def test_pieces_run_at_the_same_time_when_there_are_helpers():
    crew, both = _Crew(1), threading.Barrier(2, timeout=30)
    crew.run(lambda a, b: both.wait(), [(0, 0), (1, 0)])  # ends only if two threads meet
    crew.close()


def test_the_engine_may_be_called_from_one_thread_after_another(tiny, codes, answers):
    engine = OnnxEngine(tiny.server, threads=2)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for pool in (first, second):
            np.testing.assert_array_equal(pool.submit(engine.run, codes).result(60), answers)
    engine.close()
