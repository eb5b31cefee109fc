"""One setting varied at a time, as the paper's ablations."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rsfast._files import write_json
from rsfast.deblora.config import RunConfig
from rsfast.deblora.experiment import split_rows
from rsfast.deblora.running import RunResult, run
from rsfast.deblora.sources import opened
from rsfast.deblora.tasks import Task

SWEEPS = {  # the paper's ranks and clusterers; alpha 1 moves nothing
    "clusters": (8, 16, 32, 64),
    "rho": (None, 1.0, 1.25, 2.0, 4.0),
    "rank": (8, 16, 32, 64),
    "alpha": ("auto", 1.0, 0.75, 0.5, 0.25, 0.0),
    "clusterer": ("kmeans", "minibatch", "dbscan", "hdbscan"),
    "center": ("debiased", "class-mean", "global-mean"),
    "target_set": ("balanced", "all", "tail"),
}
RESULTS = "ablations.json"


def ablate(
    config: RunConfig,
    task: Task | None = None,
    *,
    sweeps: Sequence[str] | None = None,
    report: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> RunResult:
    """:func:`run` with one setting changed at a time; all others are those of ``config``.

    Args:
        config: Its ``out`` gets a folder for each setting and ``ablations.json``; a part of it that is there is kept.
        task: As in :func:`run`.
        sweeps: Of :data:`SWEEPS`; None: all. Values that the data cannot have (more clusters than rows, a rank above
            the width) are left out.
        report: Called with each row, which has ``setting`` too.
        progress: Show bars.

    Returns:
        As :func:`run`, each row with ``setting``, ``name=value``.

    Raises:
        ValueError: A sweep is unknown; else as :func:`run`.
    """
    for name in sweeps or ():
        if name not in SWEEPS:
            raise ValueError(f"sweep must be of {', '.join(SWEEPS)}; got {name!r}")
    if task is None:
        config, task = opened(config, progress=progress)
    out, rows, by_class = Path(config.out), [], []
    rows_at_least = min(len(split_rows(task, config, seed).fit) for seed in config.seeds)
    most = {"clusters": rows_at_least, "rank": task.frozen.shape[1]}
    for name in sweeps or SWEEPS:
        for value in SWEEPS[name]:
            if name in most and value > most[name]:
                continue
            setting = f"{name}={'none' if value is None else value}"

            def tell(row: dict, setting: str = setting) -> None:
                if report is not None:
                    report({"setting": setting, **row})

            one = dataclasses.replace(config, **{name: value}, out=str(out / setting))
            found = run(one, task, report=tell, progress=progress)
            rows += [{"setting": setting, **row} for row in found.rows]
            by_class += [{"setting": setting, **row} for row in found.by_class]
            write_json(out / RESULTS, {"rows": rows})
    return RunResult(rows, by_class, [out / RESULTS])
