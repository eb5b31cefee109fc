"""A comparison of methods over seeds, that a kill does not set back."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rsfast._files import replace, write_json
from rsfast.deblora.comparison.config import RunConfig
from rsfast.deblora.comparison.experiment import compute
from rsfast.deblora.comparison.figures import draw_by_class, draw_calibration
from rsfast.deblora.comparison.methods import parse_methods
from rsfast.deblora.comparison.sources import opened
from rsfast.deblora.comparison.splits import Split, checked_splits
from rsfast.deblora.comparison.tasks import Task
from rsfast.deblora.features.files import WriterLock

RESULTS, WORK, PICTURE = "results.json", "unfinished", "calibration.npz"
FIGURES = ("calibration.png", "f1_by_class.png")
FREE = {"out", "method", "seeds", "device", "workers"}  # what may differ when a run goes on: rows stay comparable


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run found.

    Attributes:
        rows: ``method, seed, head, middle, tail, mean`` (macro F1 in percent; None: no such class), ``inter, intra``
            (cosine distances of the test features), ``seconds``.
        by_class: ``method, seed, class, train`` (its training rows), ``f1`` (percent; None: no test row is of the
            class, or was taken for it).
        files: What was written.
        clusters: ``method, seed, clusters`` (how many), ``rows, noise`` (of these rows, in no cluster),
            ``classes_of_noise`` (names of those whose rows all are, and make the de-biased centre by themselves).
    """

    rows: list[dict]
    by_class: list[dict]
    files: list[Path]
    clusters: list[dict] = dataclasses.field(default_factory=list)


def run(
    config: RunConfig,
    task: Task | None = None,
    *,
    report: Callable[[dict], None] | None = None,
    progress: bool = False,
    embedding: str = "pca",
    data: str | None = None,
) -> RunResult:
    """Compare methods, each under every seed: adapt, de-bias, probe, measure on the test rows.

    Rows that ``config.out`` holds already are kept, so that a run that was killed goes on, and methods and seeds can be
    added; trainings continue from their last epoch. The result is the same bit for bit on a CPU, but for ``seconds``,
    which are those since the last start.

    Args:
        config: All settings.
        task: What to work on; None: what ``config`` names.
        report: Called with each row when it is there.
        progress: Show bars.
        embedding: Of the picture of calibration, ``pca`` or ``tsne``.
        data: :func:`digest_of` the task, where it is known.

    Returns:
        Rows in the order of methods, then seeds; also in ``results.json``, with the settings and what was chosen for
        each probe on the validation rows.

    Raises:
        FileNotFoundError, ValueError: A setting, a file or the data do not fit, or ``config.out`` holds a run of other
            settings or data, or another process runs there. What is there stays as it is.

    Source: debLoRA, arXiv 2410.04546; its tables' columns.
    """
    methods = parse_methods(config.method)
    out = Path(config.out)
    _earlier(out / RESULTS)
    config.place()
    if task is None:
        config, task = opened(config, progress=progress)
    settings = _settings(config, data or digest_of(task))
    _refuse_others(out, _earlier(out / RESULTS), settings)
    task, splits = prepared(config, task)  # fails now, and not when other methods have been trained
    (out / WORK).mkdir(parents=True, exist_ok=True)
    lock = WriterLock(out / WORK)
    try:
        known = _earlier(out / RESULTS)
        _refuse_others(out, known, settings)
        found = _computed(out, known, task, splits, methods, config, settings, report, progress)
        shutil.rmtree(out / WORK)
    finally:
        lock.release()
    return _shown(out, found, task, methods, config, embedding)


def prepared(config: RunConfig, task: Task) -> tuple[Task, dict[int, Split]]:
    """The task under the settings, and each seed's rows; ValueError where these cannot have such settings."""
    task = task.under(config)
    return task, checked_splits(task, config)


def _computed(out, known, task, splits, methods, config, settings, report, progress) -> dict[str, list]:
    """Rows that are known, and those that were not; each is written when it is there."""
    if not known:
        (out / PICTURE).unlink(missing_ok=True)  # of results that are gone
    kept = {name: known.get(name, []) for name in ("rows", "by_class", "probes", "clusters")}
    done = {(row["method"], row["seed"]) for row in kept["rows"]}
    # work of other settings is none to go on with
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    for method in methods:
        for seed in config.seeds:
            if (method.name, seed) in done:
                continue
            work = out / WORK / f"{method.name}-{seed}-{mark}"
            work.mkdir(parents=True, exist_ok=True)
            found = compute(task, splits[seed], method, config, seed, work, progress)
            kept["rows"].append(found.row)
            kept["by_class"] += found.by_class
            kept["probes"].append(found.probe)  # so that it can be seen what a difference comes from
            kept["clusters"] += [found.clusters] if found.clusters else []
            if found.picture is not None and not (out / PICTURE).exists():
                replace(out / PICTURE, lambda temporary, found=found: _save(temporary, found.picture))
            write_json(out / RESULTS, kept | {"settings": settings})
            shutil.rmtree(work)
            if report is not None:
                report(found.row)
    return kept


def _shown(out, found, task, methods, config, embedding) -> RunResult:
    """What was asked for of all rows, and the figures."""
    order = {method.name: i for i, method in enumerate(methods)}
    asked, classes, clusters = (
        [row for row in found[name] if row["method"] in order and row["seed"] in config.seeds]
        for name in ("rows", "by_class", "clusters")
    )
    asked.sort(key=lambda row: (order[row["method"]], config.seeds.index(row["seed"])))
    files = [out / RESULTS]
    if (out / PICTURE).exists():
        with np.load(out / PICTURE) as kept:
            draw_calibration(out / FIGURES[0], **kept, classes=task.classes, embedding=embedding)
        files.append(out / FIGURES[0])
    draw_by_class(out / FIGURES[1], classes)
    return RunResult(asked, classes, [*files, out / FIGURES[1]], clusters)


def _save(path: Path, picture: dict) -> None:
    with open(path, "wb") as file:  # by name NumPy would add an ending
        np.savez(file, **picture)


def _earlier(path: Path) -> dict:
    """What the folder holds of a run."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"out: {path} is damaged: {error}; remove it, or name another folder") from error
    if not isinstance(found, dict) or not {"rows", "by_class", "settings"} <= found.keys():
        raise ValueError(f"out: {path} is not of rsfast deblora run; name another folder")
    return found


def _refuse_others(out: Path, known: dict, settings: dict) -> None:
    if known and known["settings"] != settings:
        there = known["settings"]
        other = [name for name in settings.keys() | there.keys() if settings.get(name) != there.get(name)]
        listed = ", ".join(f"{name} {there.get(name)} there and {settings.get(name)} here" for name in sorted(other))
        raise ValueError(f"out: {out} holds a run of other settings: {listed}; name another folder")


def _settings(config: RunConfig, data: str) -> dict:
    """What a row depends on, as JSON gives it back."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    return json.loads(json.dumps(kept | {"data": data}))


def digest_of(task: Task) -> str:
    """What tells the task's rows from others: of features, labels, parts and classes."""
    parts = (task.labels.tobytes(), task.is_test.tobytes(), "\n".join(map(str, task.classes)).encode())
    data = hashlib.sha256(b"".join(parts))
    if task.is_val.any():
        data.update(task.is_val.tobytes())
    for start in range(0, len(task.frozen), 4096):
        data.update(np.ascontiguousarray(task.frozen[start : start + 4096]).tobytes())
    return data.hexdigest()[:16]
