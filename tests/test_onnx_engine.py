"""The onnxruntime engine's own affairs: parts, threads, its crew. What all engines keep is in test_engine.py."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
from conftest import forged_server

from ensembler.cloud_runtime.crew import Crew
from ensembler.cloud_runtime.onnx_engine import OnnxEngine, rows_of_a_piece
from ensembler.protocol.errors import BundleError, ConfigError
from ensembler.protocol.manifest import load_server


@pytest.mark.parametrize(
    ("rows", "num_nets", "threads", "most", "piece"),
    [
        (64, 4, 2, 16, 16),
        (16, 5, 2, 16, 8),  # five pieces would be three turns of one thread and two of the other
        (16, 1, 8, 16, 2),
        (1, 4, 8, 16, 1),
        (17, 4, 2, 16, 9),
        (3, 10, 1, 16, 3),
        (4096, 3, 4, 4096, 1024),
    ],
)
def test_pieces_are_cut_so_that_all_threads_end_together(rows, num_nets, threads, most, piece):
    assert rows_of_a_piece(rows, num_nets, threads, most) == piece


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


def test_a_file_that_is_no_graph_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny.server, tmp_path / "server")
    manifest = load_server(folder)
    (folder / manifest.bodies[1]).write_bytes(b"not a graph")
    forged_server(manifest, folder)
    with pytest.raises(BundleError, match="onnxruntime"):
        OnnxEngine(folder, threads=1)


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_a_crew_does_every_piece_once(helpers):
    crew, done, lock = Crew(helpers), [], threading.Lock()

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
    crew = Crew(helpers)

    def work(a, b):
        if a == 3:
            raise ValueError("piece three")

    with pytest.raises(ValueError, match="piece three"):
        crew.run(work, [(a, 0) for a in range(8)])
    crew.run(lambda a, b: None, [(0, 0), (1, 0)])
    crew.close()


def test_pieces_run_at_the_same_time_when_there_are_helpers():
    crew, both = Crew(1), threading.Barrier(2, timeout=30)
    crew.run(lambda a, b: both.wait(), [(0, 0), (1, 0)])  # ends only if two threads meet
    crew.close()
