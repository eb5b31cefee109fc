"""One command for a machine with a GPU and little time: tests on CUDA, sanitizers, then benchmarks.

    python -m benchmarks.gpu --budget 540

What is measured is written row by row, so a run that is cut off keeps it. Exits with 1 if any part failed.
"""

import argparse
import importlib.util
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import torch

import rsfast
import rsfast.kmeans
from benchmarks import results
from tests.cases import BF16, CASES, FP32

ROOT = pathlib.Path(__file__).parent.parent
PARTS = (
    "tests",
    "memcheck",
    "racecheck",
    "ops",
    "losses",
    "tune",
    "lora",
    "kmeans",
    "deblora",
    "step",
)  # benchmarks: the time that is left
AT_MOST = {"tests": 240.0, "memcheck": 60.0, "racecheck": 45.0}  # seconds, so that no part eats the others
KEPT_FOR = {
    "losses": 150.0,
    "tune": 120.0,
    "lora": 150.0,
    "kmeans": 150.0,
    "deblora": 30.0,
    "step": 90.0,
}  # seconds that the parts before leave, if so
KERNELS = (
    "contract",
    "adapter",
    "similarity*",
    "lora*",
    "tune*",
    "kmeans*",
    "extension",
    "csrc",
)  # tests that a GPU sees more of than a CPU
SAMPLE = (
    "gated_adapter", "gated_adapter_shared", "gated_adapter_shared_lengths",
    "harma_loss_ids", "contrastive_loss", "triplet_loss_hardest", "sigmoid_loss",
    "lora_linear", "lora_linear_dropout", "lora_linear_qv", "batched_lora_linear", "batched_lora_linear_dropout_qv",
)  # fmt: skip
KMEANS = ((300, 640, 32), (301, 33, 5), (700, 64, 300))  # what one pass serves, an odd width, many clusters
MANY_PAIRS = (1537, 72)  # more than one launch of a loss holds, and no multiple of a tile


def command(part: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """What runs a part; benchmarks stop by themselves shortly before their time is up."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    chosen = ["-k", args.k] if args.k else []
    if part == "tests":
        several = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # kernels compile on the CPU
        files = [str(path.relative_to(ROOT)) for name in KERNELS for path in sorted(ROOT.glob(f"tests/test_{name}.py"))]
        # a barrier that never opens would hang: then the log says where
        return [*pytest, "-o", "faulthandler_timeout=60", *files, *several, *chosen]
    if part in ("memcheck", "racecheck"):
        tool = ["compute-sanitizer", "--tool", part, "--error-exitcode", "1", "--target-processes", "all"]
        return [*tool, sys.executable, "-m", "benchmarks.gpu", "--sample"]
    commit = ["--commit", args.commit] if args.commit else []
    if part == "tune":
        rsfast = [sys.executable, "-c", "import sys; from rsfast.cli import main; sys.exit(main())"]
        return [*rsfast, "tune", "--budget", str(max(seconds - 20, 5)), *commit]
    target = f"benchmarks/bench_{part}.py"
    options = ["--results", str(args.out), "--budget", str(max(seconds - 20, 5)), "--benchmark-disable-gc"]
    return [*pytest, target, *options, *commit, *chosen]


def sample() -> None:
    """Launch the fused kernels forward and backward at small shapes, for a sanitizer to watch."""
    for case in [c for c in CASES if c.name in SAMPLE and c.has_kernel()]:
        for shape in (*case.small[:4], *[MANY_PAIRS] * ("image_features" in case.names)):
            for dtype in (FP32, BF16):
                leaves = [t.requires_grad_() for t in case.inputs(shape, dtype, "cuda")]
                case.call(case.public, leaves, impl="fused").sum().backward()
    sample_kmeans()
    torch.cuda.synchronize()


def sample_kmeans(device: str = "cuda") -> None:
    """Every kernel of k-means: one pass, two passes, whole fits, mini-batches, the constraint."""
    for (n, width, k), dtype in itertools.product(KMEANS, (FP32, BF16)):
        x = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        centers, weights = x[:k].float(), torch.ones(n, device=device)
        rsfast.kmeans_step(x, centers, impl="fused")
        step = rsfast.kmeans_step(x, centers, weights=weights, precision="fast", impl="fused")
        rsfast.kmeans_assign(x, centers, subsidies=centers.new_zeros(k), impl="fused")
        rsfast.kmeans_update(x, step.labels, k, weights=weights, impl="fused")
        costs = rsfast.kmeans_distances(x, centers, impl="fused")
        rsfast.kmeans.constrained_assign(costs, n // (2 * k), impl="fused")
        rsfast.KMeans(k, max_iter=3, random_state=0, n_init=1).fit(x)
        rsfast.MiniBatchKMeans(k, batch_size=512, max_iter=2, random_state=0, n_init=1).fit(x)


def run(parts: list[str], args: argparse.Namespace, start) -> dict[str, str]:
    """Run the parts by ``start(command, seconds) -> exit code, None if cut off``; part -> outcome."""
    begun, outcomes = time.monotonic(), {}
    for part in parts:
        left = args.budget - (time.monotonic() - begun)
        later = [KEPT_FOR[other] for other in parts[parts.index(part) + 1 :] if other in KEPT_FOR]
        if part not in AT_MOST:
            left -= min(sum(later), left * len(later) / (len(later) + 1))
        seconds = min(left, AT_MOST.get(part, left))
        if part.endswith("check") and shutil.which("compute-sanitizer") is None:
            outcomes[part] = "skipped: compute-sanitizer is not installed"
        elif seconds < 10:
            outcomes[part] = "skipped: no time left"
        else:
            print(f"== {part}, at most {seconds:.0f} s", flush=True)
            code = start(command(part, args, seconds), seconds)
            outcomes[part] = {0: "passed", None: "cut off", 5: "nothing selected"}.get(code, f"FAILED with {code}")
    return outcomes


def start(argv: list[str], seconds: float) -> int | None:
    """Run a command with everything it starts in a session of its own, and end all of it when its time is up."""
    with subprocess.Popen(argv, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: %(default)s)")
    parser.add_argument("-k", help="select tests and benchmarks by name, as pytest does")
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, help="folder of the results files")
    parser.add_argument("--commit", help="commit to write, for a copy of the tree without its git folder")
    parser.add_argument("--sample", action="store_true", help="only launch a sample of the kernels")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU; `pytest benchmarks` runs every benchmark once without timing")
    if args.sample:
        sample()
        return 0
    args.out = args.out.resolve()
    os.environ["XDG_CACHE_HOME"] = str(
        args.out
    )  # the table of `rsfast tune` is a result too, and the benchmarks use it
    outcomes = run([part for part in PARTS if part in parts], args, start)
    for part, outcome in outcomes.items():
        print(f"{part:10} {outcome}")
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
