"""k nearest neighbours by exact search, through faiss where it is installed."""

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.deblora.learning.losses import Loss, balanced_weights
from rsfast.deblora.probes.probe import Probe, given

TILE = 1 << 26  # similarities that are in memory together
EXTRA = "faiss is not installed; pip install rsfast[faiss]"


class KnnProbe(Probe):
    """Votes of the nearest rows; the scores are the shares of the votes."""

    def __init__(self, near: "_Products | _Faiss", labels: Tensor, votes: Tensor, k: int, chosen: dict):
        super().__init__(len(votes), near.dim, chosen)
        self.near, self.labels, self.votes, self.k = near, labels, votes, k

    def _device(self) -> torch.device:
        return self.labels.device

    def _judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.labels[self.near.search(x, self.k)]  # (B, k), nearest first
        votes = self.votes[found]
        shares = votes.new_zeros(len(x), self.n_classes).scatter_add_(1, found, votes)
        shares = shares / shares.sum(1, keepdim=True)
        ahead = shares.gather(1, found) >= shares.amax(1, keepdim=True) * (1 - 1e-9)  # sums of equal votes may round
        winner = found.gather(1, ahead.int().argmax(1, keepdim=True))[:, 0]  # the nearest neighbour among the equal
        return torch.where(self.votes > 0, shares, -torch.inf), winner


def knn_probe(
    features, labels, *, n_classes: int | None = None, val: tuple | None = None, loss: Loss = "ce",
    k: int | None = None, metric: Literal["cosine", "l2"] = "cosine",
    search: Literal["auto", "faiss", "torch"] = "auto", device: torch.device | str | None = None,
) -> KnnProbe:  # fmt: skip
    """k nearest neighbours by exact search; of classes with equal votes the one of the nearest neighbour wins.

    Args:
        features: ``(N, D)`` array, tensor or store; all are held in memory, in fp32.
        labels: ``(N,)`` integers, 0 to C - 1.
        n_classes: C; None: one more than the highest label.
        val: Not used, as nothing is chosen; taken so that all probes are called alike.
        loss: ``reweight`` and ``logit-adjust`` divide the votes of a class by the number of its rows, which for
            shares of votes is both at once; ``ce`` counts them as they are.
        k: Neighbours that vote; None: 5, or all rows where there are fewer.
        metric: ``cosine`` similarity, or ``l2`` distance.
        search: ``faiss`` by its flat indices, on the CPU; ``torch`` by products on the features' device. ``auto``:
            faiss on the CPU if it is installed, else torch.
        device: Where it is searched; None: where the features are.

    Raises:
        ImportError: ``search="faiss"`` and it is not installed.
        TypeError: ``features`` is no array, tensor or store.
        ValueError: A setting, a label or a length does not fit, or a value is not finite; the row is named.

    Precision: similarities are products in fp32; which of two rows at the same distance is nearer is not defined.

    Example:
        >>> import torch
        >>> from rsfast.deblora import knn_probe
        >>> probe = knn_probe(torch.tensor([[0.0], [1.0], [9.0]]), [0, 0, 1], k=1, metric="l2")
        >>> probe.predict(torch.tensor([[7.0], [2.0]]))
        tensor([1, 0])
    """
    inputs, labels, _, n_classes, device = given(features, labels, n_classes, val, loss, device)
    for name, value, allowed in (("metric", metric, ("cosine", "l2")), ("search", search, ("auto", "faiss", "torch"))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    k = min(5, len(inputs)) if k is None else k
    if type(k) is not int or not 1 <= k <= len(inputs):
        raise ValueError(f"k must be a whole number from 1 to {len(inputs)}, the rows there are; got {k!r}")
    installed = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and not installed:
        raise ImportError(EXTRA)
    if search == "faiss" and device.type != "cpu":
        raise ValueError(f"search must be torch or auto on {device}; faiss searches on the CPU here")
    if search == "auto":
        search = "faiss" if installed and device.type == "cpu" else "torch"
    rows = inputs.batch(torch.arange(len(inputs)), device).float()
    votes = torch.ones(n_classes, dtype=torch.float64)
    if loss != "ce":
        votes = balanced_weights(torch.bincount(labels, minlength=n_classes))
    votes[torch.bincount(labels, minlength=n_classes) == 0] = 0
    near = (_Faiss if search == "faiss" else _Products)(rows, metric)
    return KnnProbe(near, labels.to(device), votes.to(device), k, {"k": k, "metric": metric, "search": search})


class _Products:
    """By all similarities, a tile of queries at a time."""

    def __init__(self, rows: Tensor, metric: str):
        self.metric, self.dim = metric, rows.shape[1]
        self.rows = F.normalize(rows) if metric == "cosine" else rows
        self.squares = self.rows.square().sum(1)

    def search(self, x: Tensor, k: int) -> Tensor:
        tiles = x.float().split(max(1, TILE // len(self.rows)))
        return torch.cat([self._near(tile, k) for tile in tiles])

    def _near(self, x: Tensor, k: int) -> Tensor:
        if self.metric == "cosine":
            return (F.normalize(x) @ self.rows.T).topk(k).indices
        return (self.squares - 2 * x @ self.rows.T).topk(k, largest=False).indices  # |x|^2 changes no order


class _Faiss:
    """By faiss's flat index."""

    def __init__(self, rows: Tensor, metric: str):
        import faiss

        self.metric, self.dim = metric, rows.shape[1]
        self.index = (faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2)(self.dim)
        self.index.add(self._ready(rows))

    def search(self, x: Tensor, k: int) -> Tensor:
        return torch.from_numpy(self.index.search(self._ready(x.float()), k)[1])

    def _ready(self, x: Tensor):
        return (F.normalize(x) if self.metric == "cosine" else x).contiguous().numpy()
