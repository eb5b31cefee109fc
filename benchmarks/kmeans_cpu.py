"""Lloyd's step on a CPU beside scikit-learn's. No GPU is needed to time it.

    python -m benchmarks.kmeans_cpu

writes ``results/cpu/kmeans_step.json``: rows of several processes, for where pages come to lie differs between them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import results
from rsfast.kmeans import reference

FILE = results.FOLDER / "cpu" / "kmeans_step.json"
PROCESSES, ROUNDS, THREADS = 5, 15, (1, 2)
SHAPE = (100_000, 1280, 32)


def ours(x: Tensor, centers: Tensor, exact: bool = True) -> Callable[[], Tensor]:
    norms = reference.row_norms(x)  # once a fit
    return lambda: reference.kmeans_step(x, centers, exact=exact, norms=norms).labels


def fast(x: Tensor, centers: Tensor) -> Callable[[], Tensor]:
    """Labels of fp32, as scikit-learn's are."""
    return ours(x, centers, exact=False)


def scikit_learns(x: Tensor, centers: Tensor) -> Callable[[], Tensor]:
    """As its KMeans calls it: threads of its own, and one of BLAS in each."""
    import numpy as np
    from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense
    from threadpoolctl import threadpool_limits

    labels, weights = np.full(len(x), -1, np.int32), np.ones(len(x), np.float32)
    new, counts, shift = np.zeros_like(centers.numpy()), *(np.zeros(len(centers), np.float32) for _ in "ab")
    given = (x.numpy(), weights, centers.numpy(), new, counts, labels, shift, torch.get_num_threads())

    def run():
        with threadpool_limits(1, user_api="blas"):
            lloyd_iter_chunked_dense(*given)
        return torch.from_numpy(labels).long()

    return run


def compare(shape: tuple[int, int, int] = SHAPE, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Least milliseconds of a step, and of its threads' time, which other work on the machine changes less."""
    n, d, k = shape
    g = torch.Generator().manual_seed(0)
    x, means = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    x += means[torch.randint(k, (n,), generator=g)]
    found, labels = {}, []
    arms = {"rsfast": ours, "rsfast, precision='fast'": fast, "scikit-learn": scikit_learns}
    for name, arm in arms.items():  # one after the other: both spin
        step = arm(x, x[:k].clone())
        labels.append(step())
        wall, cpu = [], []
        for _ in range(rounds):
            before = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - before[0])
            cpu.append(time.process_time() - before[1])
        found[name] = {"ms": 1e3 * min(wall), "cpu_ms": 1e3 * min(cpu)}
    differing = max((labels[0] != other).float().mean().item() for other in labels[1:])  # the others' are fp32's
    assert differing < 1e-3, f"{differing:.2%} of the labels differ"
    return found


def main() -> None:
    code = f"import json; from benchmarks.kmeans_cpu import compare; print(json.dumps(compare(rounds={ROUNDS})))"
    rows = []
    for threads in THREADS:
        for number in range(PROCESSES):
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout).items()
            rows += [{"impl": impl, "threads": threads, "process": number, **row} for impl, row in found]
    import sklearn

    results.write_rows(FILE, {"sklearn": sklearn.__version__, "shape": SHAPE}, rows)


if __name__ == "__main__":
    main()
