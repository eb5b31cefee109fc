"""Two pictures: features before and after calibration with their centres, and F1 against the size of a class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rsfast._files import replace

INK, FAINT, GRID = "#1c1e22", "#70747c", "#e4e6ea"
COLOURS = ("#2c5ca0", "#c82c2c", "#188c44", "#b8720a", "#7a3fa0", "#0e8c94", "#a8326e", "#5c6f16")  # on white, apart
MARKERS = "os^Dvph8"


def draw_calibration(
    path: str | Path,
    before: np.ndarray,  # (N, D)
    after: np.ndarray,  # (N, D)
    labels: np.ndarray,  # (N,)
    centers: np.ndarray,  # (K, D)
    mu: np.ndarray,  # (C, D)
    *,
    classes: Sequence[str],
    tail: Sequence[int],
    embedding: Literal["pca", "tsne"] = "pca",
    seed: int = 0,
) -> None:
    """Write a PNG of features before and after calibration in one common plane, as debLoRA's picture.

    Tail classes have colours, up to eight of them, all other rows are grey; crosses are cluster centres, stars the
    de-biased centres of the tail classes shown.

    Args:
        path: Ends in ``.png``.
        before: Features as they were extracted.
        after: The same rows, calibrated.
        labels: Their classes, integers.
        centers: Of the clusters.
        mu: De-biased centres of all classes.
        classes: Names of the classes.
        tail: Classes that were moved, smallest first.
        embedding: ``pca`` fitted to ``before``, or ``tsne`` of everything together.
        seed: Of t-SNE.
    """
    shown = list(tail)[: len(COLOURS)]
    stars = mu[shown]
    planes = _plane([before, after, centers, stars], embedding, seed)
    figure = _figure(13, 6.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, title, points in zip(panels, ("before calibration", "after calibration"), planes[:2], strict=True):
        rest = ~np.isin(labels, shown)
        axes.scatter(*points[rest].T, s=7, color="#c4c8ce", linewidths=0, label="other classes")
        for c, colour in zip(shown, COLOURS, strict=False):
            axes.scatter(*points[labels == c].T, s=20, color=colour, linewidths=0, alpha=0.9, label=classes[c])
        axes.scatter(*planes[2].T, s=46, marker="x", color=INK, linewidths=1.4, label="cluster centre")
        for star, colour in zip(planes[3], COLOURS, strict=False):
            axes.scatter(*star, s=190, marker="*", color=colour, edgecolors=INK, linewidths=1)
        axes.scatter([], [], s=120, marker="*", color="white", edgecolors=INK, label="de-biased centre")
        axes.set_title(title, loc="left", color=INK, fontsize=13)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_color(GRID)
    handles, names = panels[0].get_legend_handles_labels()
    columns = min(len(names), 6)
    figure.legend(handles, names, loc="lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=10)
    lines = -(-len(names) // columns)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.93, bottom=0.04 + 0.042 * lines, wspace=0.03)
    _save(figure, path)


def draw_by_class(path: str | Path, rows: Sequence[dict]) -> None:
    """Write a PNG of F1 by class against the number of the class's training rows: a line a method, mean over seeds.

    Args:
        path: Ends in ``.png``.
        rows: Dictionaries with ``method``, ``seed``, ``train`` (training rows of the class), ``f1`` (percent, or None).
            Under every seed classes are ranked by size, and what is averaged are the known F1 of one rank.
    """
    figure = _figure(9.5, 5.4)
    axes = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for n, method in enumerate(methods):
        sizes, scores = _by_rank([row for row in rows if row["method"] == method])
        colour = COLOURS[n % len(COLOURS)]
        dashes = "-" if n < len(COLOURS) else "--"
        marker = MARKERS[n % len(MARKERS)]
        axes.plot(sizes, scores, dashes, color=colour, marker=marker, markersize=5, linewidth=1.5, label=method)
    axes.set_xscale("log")
    axes.set_ylim(-3, 103)
    axes.set_xlabel("training rows of the class", color=INK)
    axes.set_ylabel("F1 on the test rows, percent", color=INK)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor=INK)
    figure.set_layout_engine("tight")
    _save(figure, path)


def _by_rank(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    runs = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append((row["train"], row["f1"] is not None, row["f1"] or 0))
    ranked = np.array([sorted(run) for run in runs.values()], dtype=float)  # (seeds, classes, 3)
    sizes, known, scores = np.moveaxis(ranked, 2, 0)
    return sizes.mean(0).clip(min=0.5), np.ma.array(scores, mask=known == 0).mean(0).filled(np.nan)


def _plane(parts: list[np.ndarray], embedding: str, seed: int) -> list[np.ndarray]:
    """All parts in two dimensions, the same for all."""
    parts = [np.asarray(part, dtype=np.float32) for part in parts]
    if embedding == "tsne":
        from sklearn.manifold import TSNE

        together = np.concatenate(parts)
        flat = TSNE(perplexity=min(30.0, (len(together) - 1) / 3), init="pca", random_state=seed).fit_transform(
            together
        )
        return np.split(flat, np.cumsum([len(part) for part in parts])[:-1])
    middle = parts[0].mean(0)
    _, _, axes = np.linalg.svd(parts[0] - middle, full_matrices=False)
    axes = np.pad(axes[:2], ((0, 2 - len(axes[:2])), (0, 0)))  # a single row, or a single column, has one axis
    return [(part - middle) @ axes.T for part in parts]


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, whatever the machine's default is
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | Path) -> None:
    replace(Path(path), lambda temporary: figure.savefig(temporary, format="png"))
