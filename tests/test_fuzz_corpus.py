"""What the fuzzer kept (`make fuzz`) is replayed, and changed a little, in a process that may hardly allocate anything.

No fuzzer is needed here. ``tests/fuzz/targets.py`` says what holds for every input of every decoder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from fuzz.mutations import flipped, mutated
from fuzz.targets import TARGETS, joined, split
from hypothesis import given
from hypothesis import strategies as st

from ensembler.protocol.messages import LIMITS

CORPUS = Path(__file__).resolve().parent / "fuzz" / "corpus"
NAMES = sorted(TARGETS)

# Runs in a process of its own, which after its imports gets 64 MiB more and a minute of CPU time.
REPLAY = """
import json, random, resource, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from fuzz.mutations import flipped, mutated
from fuzz.targets import TARGETS

target = TARGETS[sys.argv[2]]
target.warm_up()
pages = int(Path("/proc/self/statm").read_text().split()[0])
bound = pages * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    bytearray(80 * 2**20)
except MemoryError:
    bounded = True
else:
    bounded = False
rng = random.Random(0)
files = sorted((Path(sys.argv[1]) / "fuzz" / "corpus" / target.name).iterdir())
corpus = [*target.seeds(), *(path.read_bytes() for path in files)]
kept = sum(target.measured(data) for data in corpus)
changed = [mutated(target, rng.choice(corpus), rng, flipped(rng)) for _ in range(int(sys.argv[3]))]
accepted = sum(target(data) for data in changed)
print(json.dumps({"bounded": bounded, "files": len(files), "kept": kept, "accepted": accepted}))
"""


@pytest.mark.parametrize("name", NAMES)
def test_kept_and_changed_inputs_are_read_rightly_or_refused_within_a_bound_of_memory(name):
    changed = 1000
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPLAY, str(CORPUS.parent.parent), name, str(changed)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["bounded"]
    assert told["files"] == len(list((CORPUS / name).iterdir())) > 0
    # Both sides of the decoder are seen, what it takes and what it refuses; no changed ciphertext is taken.
    assert told["kept"] > 0
    assert told["accepted"] < changed
    assert told["accepted"] > 0 or name == "sealed"


@given(st.sampled_from(NAMES), st.binary(max_size=300))
def test_any_bytes_are_read_rightly_or_refused(name, data):
    TARGETS[name](data)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_read(name):
    assert all(TARGETS[name].measured(seed) for seed in TARGETS[name].seeds())


def test_a_header_that_claims_the_largest_tensor_allocates_nothing_for_it():
    target = TARGETS["message"]
    target.warm_up()
    header, _ = split(target.seeds()[0])
    for codec, shape in (("u8", [4096, 16384]), ("u2", [1, 1 << 26]), ("u3", [4096, 64, 64, 4])):
        claimed = msgpack.packb(msgpack.unpackb(header) | {"tensor": [codec, shape]})
        data = joined(claimed, bytes(100))
        assert not target(data)
        assert target.peak_bytes(data) < 16 * 1024


def test_a_header_of_lists_within_lists_allocates_a_multiple_of_its_size():
    target = TARGETS["message"]
    target.warm_up()
    deep = b"\xdc\x00\x40" * 1300  # every list says that it has 64 places, and holds one
    assert not target.measured(joined(b"\x81\xa1v" + deep, b""))
    assert len(deep) < LIMITS.header_bytes


# --- the targets would notice ---


def faulty(name, **changes):
    return dataclasses.replace(TARGETS[name], **changes)


def test_an_error_that_is_not_typed_fails_a_target():
    def decode(data):
        raise KeyError("op")

    with pytest.raises(KeyError):
        faulty("message", decode=decode)(b"")


def test_a_decoder_that_allocates_what_an_input_claims_fails_its_target():
    def decode(data):
        np.zeros(2**24, np.uint8)

    with pytest.raises(AssertionError, match="allocate"):
        faulty("message", decode=decode).measured(b"")


def test_a_message_that_is_read_wrongly_fails_its_target():
    def decode(data):
        message = TARGETS["message"].decode(data)
        return dataclasses.replace(message, request_id=bytes(16))

    with pytest.raises(AssertionError):
        faulty("message", decode=decode)(TARGETS["message"].seeds()[0])


def test_codes_that_are_unpacked_wrongly_fail_their_target():
    def decode(data):
        return TARGETS["packed"].decode(data)[..., ::-1]

    with pytest.raises(AssertionError):
        faulty("packed", decode=decode)(TARGETS["packed"].seeds()[1])


def test_the_mutator_makes_inputs_that_differ_and_fit():
    for target in TARGETS.values():
        rng = random.Random(1)
        seeds = target.seeds()
        made = {mutated(target, rng.choice(seeds), rng, flipped(rng)) for _ in range(100)}
        assert len(made) > 50
        assert max(map(len, made)) <= target.max_bytes
