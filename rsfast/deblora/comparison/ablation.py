"""One setting varied at a time, as the paper's ablations."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rsfast._files import write_json
from rsfast.deblora.comparison.config import RunConfig, SettingError
from rsfast.deblora.comparison.running import RunResult, digest_of, prepared, run
from rsfast.deblora.comparison.sources import opened
from rsfast.deblora.comparison.tasks import Task
from rsfast.deblora.debiasing.clustering import NoClusterError

SWEEPS = {  # the paper's ranks and clusterers; alpha 1 moves nothing
    "clusters": (8, 16, 32, 64),
    "rho": (None, 1.0, 1.25, 2.0, 4.0),
    "rank": (8, 16, 32, 64),
    "alpha": ("auto", 1.0, 0.75, 0.5, 0.25, 0.0),
    "clusterer": ("kmeans", "minibatch", "dbscan", "hdbscan"),
    "center": ("debiased", "class-mean", "global-mean"),
    "target_set": ("balanced", "all", "tail"),
}
RESULTS, BASE = "ablations.json", "base"


def ablate(
    config: RunConfig,
    task: Task | None = None,
    *,
    sweeps: Sequence[str] | None = None,
    report: Callable[[dict], None] | None = None,
    progress: bool = False,
    embedding: str = "pca",
) -> RunResult:
    """:func:`run` with one setting changed at a time; all others are those of ``config``.

    Args:
        config: Its ``out`` gets a folder for each setting and ``ablations.json``; a part of it that is there is kept.
        task: As in :func:`run`.
        sweeps: Of :data:`SWEEPS`; None: all. Values that the data cannot have (more clusters than rows, a rho that
            asks for more than there are, a rank above the width, a clusterer that finds noise alone) are left out, and
            a warning says so.
        report: Called with each row, which has ``setting`` too.
        progress: Show bars.
        embedding: As in :func:`run`.

    Returns:
        As :func:`run`, each row with ``setting``, ``name=value``.

    Raises:
        ValueError: A sweep is unknown, or the data can have none of the values; else as :func:`run`.
    """
    for name in sweeps or ():
        if name not in SWEEPS:
            raise SettingError("sweep", f"{{}} must be of {', '.join(SWEEPS)}; got {name!r}")
    if task is None:
        config, task = opened(config, progress=progress, early=False)
    out, rows, by_class, clusters, reasons = Path(config.out), [], [], [], []
    shown = dict(progress=progress, embedding=embedding, data=digest_of(task))  # all settings have the same rows
    for name in sweeps or SWEEPS:
        for value in SWEEPS[name]:
            setting = f"{name}={'none' if value is None else value}"
            folder = BASE if value == getattr(config, name) else setting  # which all sweeps have in common
            one = dataclasses.replace(config, **{name: value}, out=str(out / folder))
            found, reason = _one(one, task, setting, report, shown)
            if found is None:
                reasons.append(f"{setting} is left out: {reason}")
                warnings.warn(reasons[-1], stacklevel=2)
                continue
            rows += [{"setting": setting, **row} for row in found.rows]
            by_class += [{"setting": setting, **row} for row in found.by_class]
            clusters += [{"setting": setting, **row} for row in found.clusters]
            write_json(out / RESULTS, {"rows": rows, "clusters": clusters})
    if not rows:
        raise SettingError("sweep", f"{{}}: the data can have none of the values; {reasons[0]}")
    return RunResult(rows, by_class, [out / RESULTS], clusters)


def _one(config: RunConfig, task: Task, setting: str, report, shown: dict) -> tuple[RunResult | None, str]:
    """A run, or why there cannot be one."""

    def tell(row: dict) -> None:
        if report is not None:
            report({"setting": setting, **row})

    try:
        prepared(config, task)
    except ValueError as error:
        return None, str(error)
    try:
        return run(config, task, report=tell, **shown), ""
    except NoClusterError as error:
        return None, str(error)
