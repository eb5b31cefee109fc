"""For each kernel: its floor, what was predicted before anything ran on a GPU, what came of it, and where it loses.

python -m benchmarks.outcomes          rewrite the tables in benchmarks/NOTES.md from benchmarks/results

"""

import pathlib
from typing import NamedTuple

from benchmarks import floors, kmeans, lora, results
from benchmarks.arms import short
from benchmarks.report import SHOWN, grouped

START, END = "<!-- outcomes:start -->", "<!-- outcomes:end -->"
LOSING = "<!-- losing:start -->", "<!-- losing:end -->"
COMPILED = ("-compiled", "-tuned")
BOTH, FORWARD, STEP = "forward+backward", "forward", "step"
OURS = {"adapter": "fused", "similarity": "fused", "lora": "auto", "kmeans": "auto", "step": "rsfast"}


class Aim(NamedTuple):
    """A prediction; nothing of it is a result.

    Args:
        family: With the next four, the row that it is about.
        op: As in the results.
        shape: As in the results.
        dtype: As in the results.
        which: Pass.
        seconds: Of ours, at most; None where only ratios were predicted.
        times: Implementation -> its time over ours, at least.
        floor: Seconds, estimated; None where nobody has estimated it.
    """

    family: str
    op: str
    shape: str
    dtype: str
    which: str
    seconds: float | None
    times: dict[str, float]
    floor: float | None = None


ADAPTERS = (  # microseconds: the upper end of what was predicted
    ("gated_adapter", (256, 197, 768), FORWARD, 200, {"harma": 4.0, "harma-sdpa-compiled": 1.5}),
    ("gated_adapter", (256, 197, 768), BOTH, None, {"harma": 3.5, "harma-compiled": 1.4}),
    ("gated_adapter", (256, 257, 1024), FORWARD, None, {"harma": 4.5, "harma-sdpa-compiled": 1.5}),
    ("gated_adapter", (256, 50, 768), FORWARD, 30, {"harma-sdpa-compiled": 2.0}),
    ("gated_adapter_shared", (256, 77, 512), BOTH, None, {"harma": 3.5, "harma-compiled": 1.4}),
)
LOSSES = (  # milliseconds
    ("contrastive_loss", (65536, 512), "bfloat16", 30, {
        "open_clip": 4.0, "open_clip-compiled": 2.5, "memeff": 3.0, "inf-cl": 15.0, "quack-8192-exp": 1.4,
        "cce-exact": 4.0,
    }),
    ("contrastive_loss", (65536, 1024), "bfloat16", 54, {"liger": 2.4}),
    ("contrastive_loss", (1 << 20, 512), "bfloat16", 7500, {}),
    ("sigmoid_loss", (65536, 768), "bfloat16", 32, {"siglip-kernel": 1.5}),
    ("harma_loss_ids", (32768, 512), "bfloat16", 10, {"harma-cleaned": 10.0}),
    ("harma_loss_ids", (32768, 512), "float32", 22, {"harma-cleaned": 5.0}),
    ("harma_loss_ids", (428, 512), "float32", 0.012, {"harma-cleaned-compiled": 3.0}),
    ("triplet_loss_hardest", (65536, 512), "bfloat16", 9, {"reference": 8.0}),
)  # fmt: skip


def aims() -> list[Aim]:
    """All of them, a family after the other."""
    found = []
    for op, shape, which, most, times in ADAPTERS:
        floor = floors.adapter_floor(op, shape, which)
        found.append(Aim("adapter", op, short(shape), "bfloat16", which, most and most / 1e6, times, floor))
    for op, shape, dtype, most, times in LOSSES:
        floor = floors.loss_floor(op, shape) if dtype == "bfloat16" else None
        found.append(Aim("similarity", op, short(shape), dtype, BOTH, most / 1e3, times, floor))
    for name, by_impl in lora.TARGETS.items():
        row = lora.ROWS[name]
        for shape in row.shapes[: row.main]:
            for which in (BOTH, FORWARD):
                times = {impl: lora.target(name, shape, impl, which) for impl in by_impl if impl != "auto"}
                times = {impl: aim for impl, aim in times.items() if aim}
                if over := lora.target(name, shape, "auto", which):
                    times["frozen"] = round(1 / over, 2)
                floor = floors.lora_floor(name, shape, which)
                if times:
                    found.append(Aim("lora", name, short(shape), "bfloat16", which, None, times, floor))
    for target in kmeans.TARGETS:
        for dtype in target.dtypes:
            times = {}
            for impl in kmeans.ROWS[target.op].arms:
                times |= {impl: kmeans.aims(target.op, target.shape, dtype, impl).get("target")}
            times = {impl: least for impl, least in times.items() if least}
            floor = floors.kmeans_floor(target.op, target.shape, dtype)
            aim = Aim("kmeans", target.op, short(target.shape), short(dtype), FORWARD, target.seconds, times, floor)
            found.append(aim)
    return found


def table(rows: list[dict]) -> list[str]:
    """A line for each prediction; the last three columns are empty until it has been measured."""
    known = {tuple(row[name] for name in results.KEY): row for row in rows}
    heads = ["kernel, shape, dtype, pass", "floor, ms", "prediction", "measured", "outcome", "commit"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|---|---|---|---|"]
    for aim in aims():
        name = f"{aim.op}, {aim.shape}, {aim.dtype}, {aim.which}"
        floor = "" if aim.floor is None else f"{aim.floor * 1e3:.3g}"

        def found(impl, aim=aim):
            return known.get((aim.family, aim.op, aim.shape, aim.dtype, impl, aim.which))

        ours = found(OURS[aim.family])
        if aim.seconds is not None:
            cells = ["", "", ""]
            if ours:
                share = f" ({aim.floor / ours['seconds']:.0%} of the floor)" if aim.floor else ""
                cells = [f"{ours['seconds'] * 1e3:.3g} ms{share}", _outcome(aim.seconds / ours["seconds"])]
                cells += [ours["commit"][:8]]
            lines.append("| " + " | ".join([name, floor, f"≤ {aim.seconds * 1e3:g} ms", *cells]) + " |")
        for impl, least in aim.times.items():
            theirs, cells = found(impl), ["", "", ""]
            beside = theirs and (theirs.get("beside_seconds") or (ours and ours["seconds"]))
            if beside:
                times = theirs["seconds"] / beside
                cells = [f"{times:.2f}", _outcome(times / least), theirs["commit"][:8]]
            lines.append("| " + " | ".join([name, floor, f"≥ {least:g} times {impl}", *cells]) + " |")
    return lines


def losing(rows: list[dict]) -> list[str]:
    """A line for each call that what torch.compile makes of PyTorch's operations takes no more time and memory for."""
    lines = []
    for (op, shape, dtype, which), group in grouped([row for row in rows if row["pass"] in SHOWN]).items():
        ours = group.get(OURS.get(next(iter(group.values()))["family"], "auto"))
        compiled = [name for name in group if name.endswith(COMPILED) and not name.startswith("rsfast")]
        for name in compiled if ours else ():
            theirs = group[name]
            seconds, memory = theirs.get("beside_seconds") or ours["seconds"], ours["peak_memory"]
            if theirs["seconds"] <= seconds and theirs["peak_memory"] <= memory:
                lines.append(
                    f"- {op}, {shape}, {dtype}, {which}: {seconds * 1e3:.3g} ms and {memory / 1e6:.0f} MB; {name} "
                    f"{theirs['seconds'] * 1e3:.3g} ms and {theirs['peak_memory'] / 1e6:.0f} MB ({ours['commit'][:8]})"
                )
    return lines or ["None of those that were measured." if rows else "Nothing has been measured."]


def _outcome(reached: float) -> str:
    """Of what was aimed at, 1 and more is met."""
    return "met" if reached >= 1 else f"missed: {reached:.0%} of it"


def notes_with_table(text: str, folder: pathlib.Path = results.FOLDER) -> str:
    """NOTES with the tables between their markers, from the results of the GPU measured last."""
    files = [results.read(path) for path in sorted(folder.glob("*.json"))]
    newest = max(files, key=lambda found: found["date"], default={"rows": []})
    for start, end, lines in ((START, END, table(newest["rows"])), (*LOSING, losing(newest["rows"]))):
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    floors.NOTES.write_text(notes_with_table(floors.NOTES.read_text()))
