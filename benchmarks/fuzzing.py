"""Fuzzes every decoder with atheris, coverage-guided, and records how many inputs, crashes and which coverage.

    make fuzz                                       # 5,000,000 inputs
    python benchmarks/fuzzing.py --inputs 100000 --no-record

The targets and what must hold for every input are in ``tests/fuzz/targets.py``. Each target runs in a process of its
own, one after the other, its address space limited to 1 GiB; one input in sixteen is decoded under tracemalloc, and its
decoder may allocate a constant and a multiple of the input's size. What the fuzzer found worth keeping is in
``out/fuzz/NAME/corpus``; ``--keep`` minimises it into ``tests/fuzz/corpus``, which the ordinary tests replay.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import coverage
import results

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "tests" / "fuzz" / "run_atheris.py"
KEPT = ROOT / "tests" / "fuzz" / "corpus"

# Of all inputs, in hundredths: most for what reads from the network.
SHARES = {
    "message": 36,
    "client": 14,
    "server": 12,
    "program": 8,
    "card": 6,
    "request_id": 14,
    "packed": 9,
    "sealed": 1,
}
DECODERS = (
    "protocol/messages.py",
    "protocol/codec.py",
    "protocol/manifest.py",
    "protocol/program.py",
    "edge_runtime/card.py",
)

INPUT_TIMEOUT_S = 5
RSS_LIMIT_MB = 512
CRASHES_TO_STOP_AT = 10
# libFuzzer's names for what it writes when an input fails.
FAILURES = ("crash-*", "timeout-*", "oom-*", "leak-*")


def runner(name: str, *arguments: str, log: Path) -> None:
    """Runs one target with libFuzzer's arguments; its output is added to ``log``."""
    with log.open("a", encoding="utf-8") as stream:
        subprocess.run([sys.executable, str(RUNNER), name, *arguments], stdout=stream, stderr=stream, check=False)


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> dict[str, int]:
    """Gives one target so many inputs.

    Args:
        name: of the target.
        inputs: how many; a crash ends libFuzzer, which then goes on with another seed.
        seed: libFuzzer's.
        folder: for the corpus, the log and the inputs that failed.

    Returns:
        ``inputs`` executed, ``crashes``, ``edges`` and ``features`` covered.
    """
    corpus, failed, log = folder / "corpus", folder / "failed", folder / "log.txt"
    corpus.mkdir(parents=True, exist_ok=True)
    failed.mkdir(exist_ok=True)
    kept = [str(KEPT / name)] if (KEPT / name).is_dir() else []
    executed = edges = features = 0
    while executed < inputs and crashes(name, failed) < CRASHES_TO_STOP_AT:
        log.unlink(missing_ok=True)
        runner(
            name,
            *(str(corpus), *kept, f"-runs={inputs - executed}", f"-seed={seed}", f"-artifact_prefix={failed}/"),
            *(f"-timeout={INPUT_TIMEOUT_S}", f"-rss_limit_mb={RSS_LIMIT_MB}", "-print_final_stats=1"),
            log=log,
        )
        text = log.read_text(encoding="utf-8", errors="replace")
        done = re.search(r"stat::number_of_executed_units: +(\d+)", text)
        reached = re.findall(r"cov: (\d+) ft: (\d+)", text)
        if done is None or not reached:
            raise SystemExit(f"the fuzzer of {name} did not run; {log} says why")
        executed += int(done[1])
        edges, features = (max(pair) for pair in ((edges, int(reached[-1][0])), (features, int(reached[-1][1]))))
        seed += 1
    return {"inputs": executed, "crashes": crashes(name, failed), "edges": edges, "features": features}


def crashes(name: str, failed: Path) -> int:
    """Returns how many inputs failed; a timeout counts if it happens again, since a process may have been stopped."""
    for path in failed.glob("timeout-*"):
        again = [sys.executable, str(RUNNER), name, str(path), f"-timeout={INPUT_TIMEOUT_S}"]
        if subprocess.run(again, capture_output=True, check=False).returncode == 0:
            path.rename(failed / f"once-{path.name}")
    return sum(1 for pattern in FAILURES for _ in failed.glob(pattern))


def keep(name: str, folder: Path) -> None:
    """Replaces a target's kept corpus by the fewest inputs that reach all that is reached."""
    with tempfile.TemporaryDirectory() as fewest:
        sources = [str(path) for path in (folder / "corpus", KEPT / name) if path.is_dir()]
        runner(name, "-set_cover_merge=1", fewest, *sources, log=folder / "log.txt")
        if not any(Path(fewest).iterdir()):
            raise SystemExit(f"nothing of {name}'s corpus is left; {folder / 'log.txt'} says why")
        shutil.rmtree(KEPT / name, ignore_errors=True)
        shutil.copytree(fewest, KEPT / name)


def seeds_into(out: Path) -> None:
    """Writes every target's valid inputs, and corpora of before, where the fuzzer begins."""
    from fuzz.targets import TARGETS

    for name, target in TARGETS.items():
        folder = out / name / "corpus"
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(target.seeds()):
            (folder / f"seed-{index}").write_bytes(data)


def line_coverage(out: Path) -> dict[str, float]:
    """Returns the share of lines of each decoder's module, in percent, that the corpus runs."""
    measured = coverage.Coverage(data_file=None, include=[str(ROOT / path) for path in DECODERS])
    for name in [name for name in sys.modules if name.split(".")[0] in ("ensembler", "fuzz")]:
        del sys.modules[name]  # so that the lines at the top are seen too
    measured.start()
    from fuzz.targets import TARGETS

    for name, target in TARGETS.items():
        for path in sorted((out / name / "corpus").iterdir()):
            target(path.read_bytes())
    measured.stop()
    found = {}
    for path in DECODERS:
        _, lines, _, missed, _ = measured.analysis2(str(ROOT / path))
        found[path] = 100 * (1 - len(missed) / len(lines))
    return found


def main() -> None:
    """Fuzzes, records and keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--inputs", type=int, default=5_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="corpora, logs, inputs that failed")
    parser.add_argument("--keep", action="store_true", help="minimise the corpora into tests/fuzz/corpus")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    seeds_into(options.out)
    start = time.monotonic()
    found: dict[str, dict[str, int]] = {}
    for name, share in SHARES.items():
        found[name] = fuzz(name, -(-options.inputs * share // 100), options.seed, options.out / name)
        print(name, found[name], flush=True)
    minutes = (time.monotonic() - start) / 60
    if options.keep:
        for name in SHARES:
            keep(name, options.out / name)
    lines = line_coverage(options.out)
    total = {key: sum(each[key] for each in found.values()) for key in ("inputs", "crashes", "edges", "features")}
    by_target = "; ".join(
        f"{name} {each['inputs']:,} inputs, {each['edges']} edges, {each['features']} features"
        for name, each in found.items()
    )
    by_module = ", ".join(f"{path} {percent:.1f}" for path, percent in lines.items())
    bounds = f"1 GiB of address space, {INPUT_TIMEOUT_S} s an input, one input in 16 under tracemalloc"
    figures = [
        results.figure("fuzz_inputs", total["inputs"], "inputs", ">= 5000000", f"atheris; {by_target}"),
        results.figure(
            "fuzz_crashes",
            total["crashes"],
            "inputs",
            "0",
            f"untyped errors, results that do not survive a round trip, allocations beyond the bound; {bounds}",
        ),
        results.figure(
            "fuzz_edges", total["edges"], "edges", "", "instrumented branches reached, sum over the targets"
        ),
        results.figure(
            "fuzz_line_coverage_percent",
            round(sum(lines.values()) / len(lines), 1),
            "percent",
            "",
            f"mean of the decoders' modules, which also hold code that writes: {by_module}",
        ),
    ]
    print(f"{minutes:.1f} minutes")
    if not options.no_record:
        results.record("cloud", figures, command=f"make fuzz FUZZ_INPUTS={options.inputs}", seed=options.seed)
    else:
        for figure in figures:
            print(figure["figure"], figure["value"], figure["note"])
    if total["crashes"]:
        raise SystemExit(f"{total['crashes']} inputs failed: {options.out}/*/failed")


if __name__ == "__main__":
    main()
