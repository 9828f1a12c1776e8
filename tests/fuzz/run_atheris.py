"""Runs one target under atheris, a coverage-guided fuzzer: ``run_atheris.py TARGET [libFuzzer's arguments]``.

benchmarks/fuzzing.py starts it for every target; alone it is for looking at one input: ``run_atheris.py message FILE``.
"""

from __future__ import annotations

import random
import resource
import shlex
import sys
from pathlib import Path

import atheris

# What the decoders import is loaded before, so that our modules alone are instrumented.
import msgpack  # noqa: F401
import numpy as np  # noqa: F401
from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: F401
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305  # noqa: F401

with atheris.instrument_imports(include=["ensembler"], enable_loader_override=False):
    import ensembler.edge_runtime.card
    import ensembler.edge_runtime.sealing
    import ensembler.protocol.manifest
    import ensembler.protocol.messages
    import ensembler.protocol.program  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fuzz.mutations import mutated
from fuzz.targets import TARGETS

ADDRESS_SPACE_BYTES = 1 << 30  # of the whole process, the fuzzer's own corpus included


def main() -> None:
    """Fuzzes until libFuzzer's arguments say that it is enough, or something fails."""
    target = TARGETS[sys.argv[1]]
    target.warm_up()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))

    def one(data: bytes) -> None:
        target(data)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        return mutated(target, data, random.Random(seed), atheris.Mutate)[:max_size]

    # libFuzzer starts itself again to minimise a corpus, by this line of a shell.
    itself = shlex.join([sys.executable, str(Path(__file__).resolve()), target.name])
    arguments = [itself, f"-max_len={target.max_bytes}", *sys.argv[2:]]
    atheris.Setup(arguments, one, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
