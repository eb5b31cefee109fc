"""Mini-batch k-means over rows that stay on disk, which a kill does not set back to the start."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import rsfast
from rsfast._files import replace
from rsfast.deblora.arrays import Rows
from rsfast.deblora.debiasing.clusters import read_npz
from rsfast.deblora.debiasing.scaling import Scaling
from rsfast.kmeans import certify, constrained_assign, size_bounds

PATIENCE = 10  # batches without a new least smoothed inertia


class Stream:
    """Centres from shuffled batches.

    Batch i of pass p is a piece of a permutation drawn from the seed and p, so that a checkpoint needs no more than
    the number of batches, the model's state and three numbers that tell when to end.
    """

    def __init__(
        self, rows: Rows, model: "rsfast.MiniBatchKMeans", seed: int, scaling: Scaling | None, device: torch.device
    ):
        self.rows, self.model, self.seed, self.scaling, self.device = rows, model, seed, scaling, device
        self.size = min(model.batch_size, len(rows))
        self.per_pass = len(rows) // self.size
        self.last = model.max_iter * self.per_pass
        self.step, self.average, self.least, self.idle = 0, math.inf, math.inf, 0

    def run(self, checkpoint: Path | None, every: int, about: str, progress: bool) -> Tensor:
        """Centres (K, D) in the space of the batches."""
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint, about)
        with tqdm(total=self.last, initial=self.step, desc="batches", leave=False, disable=not progress) as bar:
            for indices in self._drawn():
                self._advance(self._scaled(self.rows.take(indices, self.device)))
                bar.update()
                if checkpoint is not None and (self.step % every == 0 or self.done):
                    self._save(checkpoint, about)
        return self.model.cluster_centers_

    @property
    def done(self) -> bool:
        return self.step >= self.last or self.idle >= PATIENCE

    def labels(self, centers: Tensor, rho: float | None, progress: bool) -> tuple[Tensor, bool | None]:
        """The cluster of every row for these centres, under the constraint exactly, and whether that was proven."""
        parts = self.rows.batches(device=self.device)
        step = tqdm(total=len(self.rows), desc="rows", leave=False, disable=not progress)
        labels, costs = torch.empty(len(self.rows), dtype=torch.int64, device=self.device), None
        if rho is not None:
            costs = torch.empty(len(self.rows), len(centers), dtype=centers.dtype, device=self.device)
        with step:
            for start, part in parts:
                part, here = self._scaled(part), slice(start, start + len(part))
                if costs is None:
                    labels[here] = rsfast.kmeans_assign(part, centers).labels
                else:
                    costs[here] = rsfast.kmeans_distances(part, centers)
                step.update(len(part))
        if costs is None:
            return labels, None
        bounds = size_bounds(*costs.shape, rho=rho)
        found = constrained_assign(costs, *bounds)
        return found.labels, certify(costs, *found, *bounds)

    def _drawn(self) -> Iterator[Tensor]:
        order = None
        while not self.done:
            number, place = divmod(self.step, self.per_pass)
            if order is None or not place:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
                order = torch.randperm(len(self.rows), generator=generator)
            yield order[place * self.size : (place + 1) * self.size]

    def _advance(self, batch: Tensor) -> None:
        """A step, and the rule that ends ``MiniBatchKMeans.fit``: the first batch tells of the start alone."""
        inertia = self.model.partial_fit(batch, label=False).inertia_ / self.size
        if self.step:
            rate = min(1.0, 2.0 * self.size / (len(self.rows) + 1))
            self.average = inertia if math.isinf(self.average) else self.average + rate * (inertia - self.average)
            self.idle = 0 if self.average < self.least else self.idle + 1
            self.least = min(self.least, self.average)
        self.step += 1

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scaling is None else self.scaling.apply(x)

    def _save(self, checkpoint: Path, about: str) -> None:
        state = self.model.state()
        arrays = {name: value.numpy(force=True) for name, value in state.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in state.items() if isinstance(value, int)}
        own = dict(step=self.step, average=self.average, least=self.least, idle=self.idle)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, about=about, numbers=json.dumps(numbers), own=json.dumps(own), **arrays)

        replace(checkpoint, write)

    def _restore(self, checkpoint: Path, about: str) -> None:
        found = read_npz(checkpoint, ("about", "numbers", "own", "centers", "counts"))
        theirs, ours = json.loads(str(found["about"])), json.loads(about)
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise ValueError(
                    f"checkpoint {checkpoint} is of other data or settings: {name} was {theirs.get(name)!r} and is "
                    f"{ours[name]!r}; remove it, or name another file"
                )
        state: dict[str, Any] = dict(json.loads(str(found["numbers"])), subsidies=None)
        for name in ("centers", "counts", "subsidies"):
            if name in found:
                state[name] = torch.from_numpy(found[name]).to(self.device)
        self.model.resume(state)
        for name, value in json.loads(str(found["own"])).items():
            setattr(self, name, value)
