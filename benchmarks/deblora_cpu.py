"""debLoRA on a CPU: what streaming a store needs in memory, and README's table. No GPU is needed for either.

    python -m benchmarks.deblora_cpu memory
    python -m benchmarks.deblora_cpu aid FEATURES.npz

writes ``results/cpu/deblora_memory.json``, and ``results/cpu/deblora_aid.json`` from the features of the AID scenes.
"""

import argparse
import itertools
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import results

FOLDER = results.FOLDER / "cpu"
MEMORY, AID = FOLDER / "deblora_memory.json", FOLDER / "deblora_aid.json"
ROWS, DIM, CLUSTERS, CLASSES, IMBALANCE = (100_000, 1_000_000), 1280, 32, 15, 100
STAGES = ("clusters", "centers", "calibrated")
PEAK = pathlib.Path("/proc/self/status")  # Linux alone says what a process held at most
METHODS = ("zero-shot", "lora", "deblora", "calibrate", "reweight", "logit-adjust")
GROUPS = ("head", "middle", "tail", "mean")


def make_store(folder: str, rows: int, dim: int, at_once: int = 10_000) -> None:
    """A store of made-up fp16 features in the order of their classes, whose sizes fall exponentially."""
    from rsfast.deblora import FeatureStore

    draw = np.random.default_rng(0)
    share = IMBALANCE ** (-np.arange(CLASSES) / (CLASSES - 1))
    labels = np.repeat(np.arange(CLASSES), np.maximum(1, rows * share / share.sum()).astype(int))
    labels = np.concatenate([np.zeros(rows - len(labels), labels.dtype), labels])
    means = draw.standard_normal((CLASSES, dim), np.float32)
    with FeatureStore.create(folder, dim, dtype="float16", classes=[f"class {c}" for c in range(CLASSES)]) as store:
        for start in range(0, rows, at_once):
            here = labels[start : start + at_once]
            store.append(means[here] + draw.standard_normal((len(here), dim), np.float32), here)


def peak() -> int:
    """Bytes that this process has held at most, pages of files among them."""
    (line,) = (line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def stream(folder: str, rho: float | None, memory_limit: int) -> dict[str, int]:
    """Peak bytes above those of the imports, after each stage; the last writes a store beside the first."""
    from rsfast.deblora import FeatureStore, calibrate, cluster_features, debiased_centers

    store = FeatureStore(folder)
    before, found = peak(), {}
    clusters = cluster_features(store, CLUSTERS, rho=rho, memory_limit=memory_limit, max_iter=1)
    assert clusters.method == "minibatch", "the rows were not streamed"
    found[STAGES[0]] = peak() - before
    mu = debiased_centers(store, store.labels, clusters.assignments, clusters.centers)
    found[STAGES[1]] = peak() - before
    with FeatureStore.create(f"{folder}.calibrated", store.dim, dtype="float16", classes=store.classes) as out:
        calibrate(store, store.labels, mu, out=out)
        assert len(out) == len(store)
    found[STAGES[2]] = peak() - before
    most = itertools.accumulate(found.values(), max)  # Linux counts pages roughly, so that a later peak may read lower
    return {"imports": before} | dict(zip(found, most, strict=True))


def memory(rows: int, dim: int, memory_limit: int = 2**27) -> list[dict]:
    """A row for each constraint: a fresh process streams a store of so many rows, of more bytes than the limit."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_store(f"{folder}/store", rows, dim)
        for rho in (2.0, None):
            shutil.rmtree(f"{folder}/store.calibrated", ignore_errors=True)
            arguments = f"{f'{folder}/store'!r}, {rho}, {memory_limit}"
            code = f"import json; from benchmarks.deblora_cpu import stream; print(json.dumps(stream({arguments})))"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            bytes_ = {"features": 2 * rows * dim} | json.loads(done.stdout)
            found.append({"rows": rows, "dim": dim, "rho": rho, "bytes": bytes_})
    return found


def aid(features: str) -> tuple[dict, list[dict]]:
    """The settings, and the rows of README's table and of its remark on the target set, with each probe's C."""
    from rsfast.deblora import RunConfig, run

    rows = []
    with tempfile.TemporaryDirectory() as out:
        for target_set, methods in (("balanced", METHODS), ("all", ("deblora",))):
            folder = f"{out}/{target_set}"
            options = dict(imbalance=float(IMBALANCE), target_set=target_set, method=",".join(methods), device="cpu")
            run(RunConfig(out=folder, features=features, **options))
            kept = json.loads(pathlib.Path(folder, "results.json").read_text())
            chosen = {(probe["method"], probe["seed"]): probe["C"] for probe in kept["probes"]}
            for row in kept["rows"]:
                del row["seconds"]  # of a machine that does other work too
                rows.append({"target_set": target_set, **row, "C": chosen[row["method"], row["seed"]]})
    given = {name: value for name, value in kept["settings"].items() if value is not None}
    return {name: value for name, value in given.items() if name not in ("features", "target_set")}, rows


def table(rows: list[dict]) -> list[str]:
    """README's lines: mean and sample standard deviation over the seeds, in percent."""
    lines = ["| method | head | middle | tail | all |", "|---|---|---|---|---|"]
    for method in METHODS:
        own = [row for row in rows if (row["method"], row["target_set"]) == (method, "balanced")]
        cells = ([row[group] for row in own] for group in GROUPS)
        cells = (f"{statistics.fmean(cell):.1f} ± {statistics.stdev(cell):.1f}" for cell in cells)
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def memory_table(rows: list[dict]) -> list[str]:
    """The lines of NOTES, in MB of 10^6 bytes."""
    lines = ["| rows | the store | `rho` | clusters | and centres | and calibration |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{row['bytes'][name] / 1e6:,.0f}" for name in ("features", *STAGES))
        features, *stages = cells
        lines.append(f"| {row['rows']:,} | {features} | {row['rho'] or 'none'} | {' | '.join(stages)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure debLoRA on a CPU.")
    commands = parser.add_subparsers(required=True, dest="what")
    commands.add_parser("memory", help="peak memory of streaming a store")
    commands.add_parser("aid", help="README's table").add_argument("features", help="npz of the AID scenes")
    args = parser.parse_args()
    if args.what == "memory":
        rows = [row for rows in ROWS for row in memory(rows, DIM)]
        results.write_rows(MEMORY, {"clusters": CLUSTERS}, rows)
        print(*memory_table(rows), sep="\n")
    else:
        settings, rows = aid(args.features)
        results.write_rows(AID, {"settings": settings}, rows)
        print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
