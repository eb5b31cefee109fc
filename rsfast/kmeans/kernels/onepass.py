"""The CUDA kernels of csrc/kmeans that read the rows once an iteration, and run all iterations in one launch."""

import ctypes
import functools

import torch
from torch import Tensor

from rsfast import _extension
from rsfast._dispatch import register

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STEP, LLOYD, MINIBATCH = range(3)
RAN_OUT, LABELS_STAY, WITHIN_TOLERANCE, EMPTY_CLUSTER, NO_IMPROVEMENT = range(5)  # how iterations ended
STATUS = torch.float64, 8  # 64 bytes; Status in csrc/kmeans/problem.cuh
_POINTERS = ("x", "order", "centers", "subsidies", "labels", "sums", "counts", "status")
_SIZES = ("width", "clusters", "exact", "mode", "iterations", "patience")


class _Problem(ctypes.Structure):
    """RsfKMeans in csrc/kmeans/kmeans.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("pitch", ctypes.c_int64),
        ("taken", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _SIZES),
        *((name, ctypes.c_double) for name in ("tolerance", "smoothing", "reassignment_ratio")),
    ]


def serves(x: Tensor, n_clusters: int, taken: int | None = None) -> bool:
    """Whether there is a one-pass kernel for these rows on their device."""
    if x.dtype not in DTYPES or x.stride(1) != 1 or not len(x) or not _extension.ready(_device(x)):
        return False
    unit = 16 // x.element_size()  # what one asynchronous copy brings
    if x.shape[1] % unit or x.stride(0) % unit or x.data_ptr() % 16:
        return False
    return _workspace(x, len(x) if taken is None else taken, n_clusters) >= 0


def _device(x: Tensor) -> torch.device | None:
    return x.device if x.is_cuda else None


def _workspace(x: Tensor, taken: int, n_clusters: int) -> int:
    """Bytes, or a negative number where there is no kernel."""
    return _asked(DTYPES[x.dtype], taken, x.shape[1], n_clusters, x.get_device())


@functools.lru_cache(4096)
def _asked(dtype: int, taken: int, width: int, n_clusters: int, device: int) -> int:
    ask = _extension.library().rsf_kmeans_workspace
    ask.restype, ask.argtypes = ctypes.c_int64, (ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    with torch.cuda.device(device):  # -1, a CPU, is none
        return ask(dtype, taken, width, n_clusters)


@functools.cache
def _run():
    types = (ctypes.c_int, ctypes.POINTER(_Problem), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return _extension.function("rsf_kmeans_onepass", *types)


def _launch(mode: int, x: Tensor, centers: Tensor, taken: int, **given) -> None:
    """Start the kernel on the current stream; tensors by name, and numbers."""
    workspace = torch.empty(_workspace(x, taken, len(centers)), dtype=torch.uint8, device=x.device)
    pointers = {name: given.pop(name, None) for name in _POINTERS[1:] if name != "centers"}
    problem = _Problem(
        x=x.data_ptr(),
        centers=centers.data_ptr(),
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()},
        pitch=x.stride(0),
        taken=taken,
        width=x.shape[1],
        clusters=len(centers),
        mode=mode,
        **given,
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    _run()(DTYPES[x.dtype], problem, workspace.data_ptr(), workspace.numel(), stream)


def fresh_status(x: Tensor) -> Tensor:
    """No iteration yet; the two inertias of mini-batches are unknown."""
    dtype, size = STATUS
    status = torch.zeros(size, dtype=dtype, device=x.device)
    status[4:6] = -1
    return status


def _launch_step(x, centers, subsidies, exact):
    labels = torch.full((len(x),), -1, device=x.device)
    sums = x.new_empty(centers.shape, dtype=torch.float32)
    counts, status = x.new_empty(len(centers), dtype=torch.float64), fresh_status(x)
    centers = centers.float().contiguous()
    subsidies = None if subsidies is None else subsidies.double().contiguous()
    _launch(
        STEP, x, centers, len(x), labels=labels, sums=sums, counts=counts, subsidies=subsidies, status=status,
        iterations=1, exact=exact,
    )  # fmt: skip
    return labels, sums, counts, status[2].clone()


def _fake_step(x, centers, subsidies, exact):
    labels = x.new_empty(x.shape[0], dtype=torch.int64)
    return (
        labels,
        centers.new_empty(centers.shape, dtype=torch.float32),
        *(x.new_empty(shape, dtype=torch.float64) for shape in ((centers.shape[0],), ())),
    )


# labels, sums, counts, and the sum of the rows' squared norms
step = register(
    "kmeans_onepass(Tensor x, Tensor centers, Tensor? subsidies, bool exact) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_step,
    _fake_step,
)


def _launch_lloyd(x, centers, labels, exact, max_iter, tol):
    labels, status, counts = labels.clone(), fresh_status(x), x.new_empty(len(centers), dtype=torch.float64)
    centers = centers.to(torch.float32, copy=True).contiguous()
    _launch(
        LLOYD, x, centers, len(x), labels=labels, counts=counts, status=status, iterations=max_iter, exact=exact,
        tolerance=tol,
    )  # fmt: skip
    return centers, labels, status


def _fake_lloyd(x, centers, labels, exact, max_iter, tol):
    dtype, size = STATUS
    return (
        centers.new_empty(centers.shape, dtype=torch.float32),
        torch.empty_like(labels),
        x.new_empty(size, dtype=dtype),
    )


# centres, labels of the last iteration, status; `labels` are those of an iteration before, or -1
lloyd = register(
    "kmeans_lloyd(Tensor x, Tensor centers, Tensor labels, bool exact, int max_iter, float tol)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_lloyd,
    _fake_lloyd,
)


def _launch_minibatch(x, centers, counts, order, exact, tol, smoothing, patience, reassignment_ratio, status):
    centers, counts, status = centers.to(torch.float32, copy=True).contiguous(), counts.clone(), status.clone()
    order = order.contiguous()
    _launch(
        MINIBATCH, x, centers, order.shape[1], order=order, counts=counts, status=status, iterations=len(order),
        exact=exact, tolerance=tol, smoothing=smoothing, patience=patience, reassignment_ratio=reassignment_ratio,
    )  # fmt: skip
    return centers, counts, status


def _fake_minibatch(x, centers, counts, order, *_):
    dtype, size = STATUS
    return (
        centers.new_empty(centers.shape, dtype=torch.float32),
        torch.empty_like(counts),
        x.new_empty(size, dtype=dtype),
    )


# centres, counts, status after the batches whose rows `order` (steps, batch) names
minibatch = register(
    "kmeans_minibatch(Tensor x, Tensor centers, Tensor counts, Tensor order, bool exact, float tol, float smoothing,"
    " int patience, float reassignment_ratio, Tensor status) -> (Tensor, Tensor, Tensor)",
    _launch_minibatch,
    _fake_minibatch,
)


def counts_of(status: Tensor) -> tuple[Tensor, Tensor]:
    """Iterations and how they ended, on the device."""
    iterations, outcome = status[:1].view(torch.int32).long()
    return iterations, outcome


def read_status(status: Tensor) -> tuple[int, int]:
    """The same as numbers; waits for the device."""
    iterations, outcome = torch.stack(counts_of(status)).tolist()
    return iterations, outcome
