"""Lloyd's step on a CPU beside scikit-learn's: no GPU is needed to time it, and nothing is written."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from rsfast.kmeans import reference

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
