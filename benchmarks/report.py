"""Turns benchmarks/results/*.json into README's tables and two plots for each GPU; no number is typed by hand.

    python benchmarks/report.py            rewrite README.md and the plots
    python benchmarks/report.py --check    fail if they are not what the results say

Standard library only, so that it runs anywhere.
"""

import argparse
import json
import pathlib
import sys
from fnmatch import fnmatchcase
from html import escape

ROOT = pathlib.Path(__file__).parent.parent
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
NOTHING = "No GPU run yet: nothing has been measured, so no speed is claimed. `python -m benchmarks.gpu` measures it."
COLUMNS = (  # left to right; an implementation not named here follows in alphabetical order
    "harma", "harma-sdpa", "harma-compiled", "harma-sdpa-compiled", "reference", "reference-compiled",
    "reference-tuned", "fused",
)  # fmt: skip
OURS = (
    "rsfast", "rsfast-lengths", "rsfast-cut", "rsfast-compiled", "rsfast-graph", "rsfast-cut-graph", "auto-graph",
    "auto-unconstrained", "auto", "fused",
)  # fmt: skip
STEPS_SAY = (  # above their table
    "times ours: its time over that of ours without a suffix (of the clustering: without the constraint), run in turn. "
    "Memory: of everything, the model included. As `-graph` a step is one CUDA graph, as `-cut` texts end with the "
    "longest of the batch."
)
LOSSES_SAY = (  # above their table
    "forward and backward. Times ours: their time over ours, run in turn. Four GEMMs: what cuBLAS took in the same "
    "run for four bf16 products of this size, as a share of the time. Error: of the features' gradients, relative to "
    "float64."
)
LORA_SAYS = (  # above its table
    "ours is `auto`; `fused` runs its kernels whatever a table says. Times ours: their time over ours, run in turn. "
    "Over frozen: over the layer without LoRA. Target: what was aimed at before anything was measured. Error: the "
    "largest of the output's and the gradients', relative to float64."
)
KMEANS_SAYS = (  # above its table
    "ours is `auto`, whose labels are exact. Times ours: their time over ours, run in turn where both can be. Target: "
    "what was aimed at before anything was measured. Floor: an estimate from bytes and products. Wrong labels: share "
    "that a float64 argmin does not give; error: the largest of the others."
)
FLOORS = ("frozen", "merged")  # have no LoRA to train, so they are no competition
RECIPES = (  # operation, shape, dtype and pass of what README shows where everything would be more than MOST lines
    "gated_adapter* 256x* bfloat16 forward*",
    "lora_linear_r16 50432x768x768 * forward+backward", "lora_linear_r16 65792x1024x1024 * forward+backward",
    "batched_lora_linear_g8_random 256x197x768x768 * forward+backward", "lora_memory *",
    "contrastive_loss 65536x512 *", "harma_loss_ids 32768x512 bfloat16 *", "harma_loss_ids 428x512 float32 *",
    "sigmoid_loss *",
    "kmeans_step 1000000x1280x32 float32 *", "kmeans_fit 7000x1280x32 float32 *",
    "kmeans_constrained_rho1.25 1000000x1280x32 *",
    "harma_vit_b_32 428 *", "lora_vit_l_14 128 *", "deblora_clustering 1000000x* *", "calibrate 1000000x* bfloat16 *",
)  # fmt: skip
MOST = 150
SHOWN = ("forward", "forward+backward", "step")  # the backward alone is in the results file
FAMILIES = ("adapter", "lora", "similarity", "kmeans", "step")
WRONG = 0.1  # of a gradient's norm: more than roundings explain, so another function, whose speed says nothing


def grouped(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(op, shape, dtype, pass) -> implementation -> row, in a stable order."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"], row["pass"]), {})[row["impl"]] = row
    return dict(sorted(groups.items(), key=lambda item: (item[0][2], item[0][0], _sizes(item[0][1]), item[0][3])))


def _sizes(shape: str) -> list[int]:
    return [-int(n) for n in shape.split("x")]


def columns(groups: dict) -> list[str]:
    """The implementations that any group has, baselines first."""
    found = {impl for group in groups.values() for impl in group}
    return [c for c in COLUMNS if c in found] + sorted(found - set(COLUMNS))


def table(rows: list[dict], copy_rate: float | None) -> list[str]:
    """Milliseconds of each implementation, the fastest in bold; how close ours is to a copy; memory; commit."""
    groups = grouped([row for row in rows if row["pass"] in SHOWN])
    names = columns(groups)
    heads = ["operation, pass", "shape, dtype", *names, "GB/s (% of copy)", "peak memory, MB", "commit"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * 2 + "---:|" * (len(names) + 2) + "---|"]
    for (op, shape, dtype, which), group in groups.items():
        fastest = min(row["seconds"] for row in group.values())
        cells = [f"{op}, {which}", f"{shape}, {dtype}"]
        for name in names:
            row = group.get(name)
            text = "" if row is None else f"{row['seconds'] * 1e3:.3f}"
            cells.append(f"**{text}**" if row is not None and row["seconds"] == fastest else text)
        ours = next((group[name] for name in OURS[::-1] if name in group), None)
        first = next(iter(name for name in names if name in group))
        cells.append(_rate(ours, copy_rate))
        peaks = [group[first], ours] if ours is not None and ours is not group[first] else [group[first]]
        cells.append(" → ".join(f"{row['peak_memory'] / 1e6:.0f}" for row in peaks))
        cells.append(", ".join(sorted({row["commit"][:8] for row in group.values()})))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def loss_table(rows: list[dict]) -> list[str]:
    """Forward and backward of each in-batch loss, one line an implementation, the fastest that is right in bold."""
    heads = [
        "loss, shape, dtype",
        "implementation",
        "ms",
        "times ours",
        "four GEMMs",
        "peak memory, MB",
        "error",
        "commit",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * 5 + "---|"]
    for (op, shape, dtype, _), group in grouped([r for r in rows if r["pass"] == "forward+backward"]).items():
        right = [row["seconds"] for row in group.values() if _error(row) <= WRONG]
        for name, row in sorted(group.items(), key=lambda item: item[1]["seconds"]):
            seconds, error = row["seconds"], _error(row)
            ours = row.get("beside_seconds") or (seconds if name == "fused" else None)
            text = f"{seconds * 1e3:.3f}"
            cells = [f"{op}, {shape}, {dtype}", f"**{name}**" if name in OURS else name]
            cells += [f"**{text}**" if seconds == min(right, default=None) else text]
            cells += [f"{seconds / ours:.2f}" if ours else ""]
            cells += [f"{100 * row['gemm_seconds'] / seconds:.0f} %" if "gemm_seconds" in row else ""]
            cells += [
                f"{row['peak_memory'] / 1e6:.0f}",
                f"{error:.0e}" + ", wrong" * (error > WRONG),
                row["commit"][:8],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _error(row: dict, ending: str = "features") -> float:
    """The largest of a row's errors whose names end so, as a share of the norm in float64; all of them by ""."""
    return max((v for name, v in row.items() if name.startswith("error_") and name.endswith(ending)), default=0.0)


def lora_table(rows: list[dict]) -> list[str]:
    """Layers with LoRA, one line an implementation, the fastest of those that are right and train in bold."""
    heads = ["layer, shape, dtype, pass", "implementation", "ms", "times ours", "target", "over frozen", "error"]
    heads += ["saved, MB", "peak memory, MB", "commit"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for (op, shape, dtype, which), group in grouped([r for r in rows if r["pass"] in SHOWN]).items():
        rivals = {name: row for name, row in group.items() if name not in FLOORS and _error(row, "") <= WRONG}
        fastest = min((row["seconds"] for row in rivals.values()), default=None)
        for name, row in sorted(group.items(), key=lambda item: item[1]["seconds"]):
            seconds, error, beside = row["seconds"], _error(row, ""), row.get("beside_seconds")
            ours = seconds if name == "auto" else beside
            alone = beside if name == "auto" else group.get("frozen", {}).get("seconds")
            text, aim = f"{seconds * 1e3:.3f}", row.get("target")
            cells = [f"{op}, {shape}, {dtype}, {which}", f"**{name}**" if name in OURS else name]
            cells += [f"**{text}**" if name in rivals and seconds == fastest else text]
            cells += [f"{seconds / ours:.2f}" if ours else ""]
            cells += ["" if aim is None else f"≤ {aim:g} over frozen" if name == "auto" else f"≥ {aim:g}"]
            cells += [f"{seconds / alone:.2f}" if alone else "", f"{error:.0e}" + ", wrong" * (error > WRONG)]
            cells += [f"{row['saved_memory'] / 1e6:.0f}" if "saved_memory" in row else ""]
            cells += [f"{row['peak_memory'] / 1e6:.0f}", row["commit"][:8]]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, *_kept_table([row for row in rows if row["pass"] == "memory"])]


def _kept_table(rows: list[dict]) -> list[str]:
    """What the LoRA of a whole tower keeps for the backward, above what the frozen tower keeps."""
    lines = []
    for (_, shape, dtype, _), group in grouped(rows).items():
        ours = group.get("auto", {}).get("kept_for_lora")
        for name, row in sorted(group.items(), key=lambda item: item[1]["kept_for_lora"]):
            kept, aim = row["kept_for_lora"], row.get("target")
            cells = [f"tower {shape}, {dtype}", f"**{name}**" if name in OURS else name, f"{kept / 1e6:.0f}"]
            cells += [f"{kept / ours:.2f}" if ours else "", "" if aim is None else f"≥ {aim:g}"]
            lines.append("| " + " | ".join([*cells, f"{row['kept_without'] / 1e6:.0f}", row["commit"][:8]]) + " |")
    if not lines:
        return []
    heads = ["samples x tokens x width x layers x head", "implementation", "kept for LoRA, MB", "times ours", "target"]
    heads += ["kept without LoRA, MB", "commit"]
    return ["", "| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2), *lines]


def kmeans_table(rows: list[dict]) -> list[str]:
    """One line an implementation, ours with its floor, the fastest of those that are right in bold."""
    heads = [
        "k-means, shape, dtype",
        "implementation",
        "ms",
        "times ours",
        "target",
        "floor, ms",
        "wrong labels",
        "error",
    ]
    lines = ["| " + " | ".join([*heads, "peak memory, MB", "commit"]) + " |", "|---|---|" + "---:|" * 8]
    for (op, shape, dtype, _), group in grouped(rows).items():
        right = [row["seconds"] for row in group.values() if _error(row, "") <= WRONG]
        ours = group.get("auto", {}).get("seconds")
        for name, row in sorted(group.items(), key=lambda item: item[1]["seconds"]):
            seconds, error = row["seconds"], _error(row, "")
            against = row.get("beside_seconds", ours)
            text, most, least = f"{seconds * 1e3:.3f}", row.get("target_seconds"), row.get("target")
            cells = [f"{op}, {shape}, {dtype}", f"**{name}**" if name in OURS else name]
            cells += [f"**{text}**" if seconds == min(right, default=None) else text]
            cells += [f"{seconds / against:.2f}" if against else ""]
            cells += [f"≤ {most * 1e3:g} ms" if most else f"≥ {least:g}" if least else ""]
            cells += [f"{row['floor_seconds'] * 1e3:.3g}" if name == "auto" else ""]
            cells += [f"{100 * row['error_labels']:.2g} %" if "error_labels" in row else ""]
            others = [v for key, v in row.items() if key.startswith("error_") and key != "error_labels"]
            cells += [(f"{max(others):.0e}" if others else "") + ", wrong" * (error > WRONG)]
            lines.append("| " + " | ".join([*cells, f"{row['peak_memory'] / 1e6:.0f}", row["commit"][:8]]) + " |")
    return lines


def step_table(rows: list[dict]) -> list[str]:
    """Whole steps, one line an implementation, the fastest in bold."""
    heads = [
        "step, batch or rows, dtype",
        "implementation",
        "ms",
        "samples/s",
        "times ours",
        "peak memory, MB",
        "commit",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * 4 + "---|"]
    for (op, shape, dtype, _), group in grouped(rows).items():
        for name, row in sorted(group.items(), key=lambda item: item[1]["seconds"]):
            seconds, beside = row["seconds"], row.get("beside_seconds")
            text, rate = f"{seconds * 1e3:.3f}", row.get("samples_per_second")
            cells = [f"{op}, {shape}, {dtype}", f"**{name}**" if name in OURS else name]
            cells += [f"**{text}**" if seconds == min(r["seconds"] for r in group.values()) else text]
            cells += ["" if rate is None else f"{rate:.0f}", f"{seconds / beside:.2f}" if beside else ""]
            lines.append("| " + " | ".join([*cells, f"{row['peak_memory'] / 1e6:.0f}", row["commit"][:8]]) + " |")
    return lines


def checked(checks: dict[str, dict]) -> str:
    """What tests and sanitizers said, in a sentence; "" where none ran."""
    said = []
    for part in ("tests", "suite", "memcheck", "racecheck"):
        if part in checks:
            found = checks[part]
            counts = [f"{found[k]} {k}" for k in ("passed", "failed", "errors", "skipped") if found.get(k) is not None]
            said.append(f"{part}: {found['outcome']}" + f" ({', '.join(counts)})" * bool(counts))
    return f"Checked on this GPU: {'; '.join(said)}.\n" if said else ""


def _rate(row: dict | None, copy_rate: float | None) -> str:
    if row is None or not row["bytes"]:
        return ""
    rate = row["bytes"] / row["seconds"]
    return f"{rate / 1e9:.0f}" + (f" ({100 * rate / copy_rate:.0f} %)" if copy_rate else "")


def plot(rows: list[dict], field: str, unit: str, factor: float, title: str) -> str:
    """Horizontal bars as SVG: a group for each operation and shape, a bar for each implementation, longer is worse."""
    groups = grouped([row for row in rows if row["pass"] in ("forward+backward", "step")])
    names = columns(groups)
    bar, left, width = 14, 330, 420
    lines, y = [], 46
    for (op, shape, dtype, _), group in groups.items():
        longest = max(row[field] for row in group.values())
        lines.append(f'<text x="10" y="{y + 11}" font-weight="bold">{escape(f"{op} {shape} {dtype}")}</text>')
        y += bar + 4
        for name in [n for n in names if n in group]:
            value = group[name][field]
            colour = "#d9730d" if name in OURS else "#8a94a6"
            lines.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
            long = width * value / max(longest, 1e-30)
            lines.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="{bar - 2}" fill="{colour}"/>')
            lines.append(f'<text x="{left + width + 8}" y="{y + 11}">{value * factor:.3g} {unit}</text>')
            y += bar
        y += 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{y + 10}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="24" font-size="15">{escape(title)}</text>'
    )
    return "\n".join([head, *lines, "</svg>"]) + "\n"


def of_recipes(rows: list[dict]) -> list[dict]:
    """Those that RECIPES names."""
    names = [" ".join(row[field] for field in ("op", "shape", "dtype", "pass")) for row in rows]
    return [row for row, name in zip(rows, names, strict=True) if any(fnmatchcase(name, one) for one in RECIPES)]


def tables(rows: list[dict], copy_rate: float | None) -> list[str]:
    """A table for each family, in the order of FAMILIES."""
    parts = []
    present = [f for f in FAMILIES if any(r["family"] == f for r in rows)]
    for family in present + sorted({r["family"] for r in rows} - set(FAMILIES)):
        mine = [row for row in rows if row["family"] == family]
        if family == "similarity":
            parts += [f"**{family}**: {LOSSES_SAY}\n", *loss_table(mine), ""]
        elif family == "lora":
            parts += [f"**{family}**: {LORA_SAYS}\n", *lora_table(mine), ""]
        elif family == "kmeans":
            parts += [f"**{family}**: {KMEANS_SAYS}\n", *kmeans_table(mine), ""]
        elif family == "step":
            parts += [f"**{family}**: {STEPS_SAY}\n", *step_table(mine), ""]
        else:
            parts += [f"**{family}**\n", *table(mine, copy_rate), ""]
    return parts


def build(folder: pathlib.Path) -> tuple[str, dict[str, str]]:
    """The text between README's markers; plots, and tables too long for it, by file name."""
    parts, files = [], {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        checks = checked(found.get("checks", {}))
        if not found["rows"]:
            parts += [f"### {found['gpu']}\n", checks] if checks else []
            continue
        facts = found.get("facts", {})
        copy_rate = facts.get("copy_bytes_per_second")
        parts.append(f"### {found['gpu']}\n")
        copied = f", copies {copy_rate / 1e12:.2f} TB/s (read and written)" if copy_rate else ""
        parts.append(
            f"Driver {found['driver']}, torch {found['torch']}, triton {found['triton']}, {found['date'][:10]}{copied}."
            " Median milliseconds of one call, device time; bold is the fastest; memory is the first column's, then "
            f"ours. From `benchmarks/results/{path.name}`, which has every pass and row.\n"
        )
        parts += [checks] if checks else []
        rows, lines = found["rows"], tables(found["rows"], copy_rate)
        if len(lines) > MOST:
            name, rows = f"{path.stem}.md", of_recipes(rows)
            files[name] = "\n".join([f"# {found['gpu']}, every row\n", *lines]).rstrip() + "\n"
            parts.append(f"Shapes of the recipes; [every row](benchmarks/results/{name}).\n")
            lines = tables(rows, copy_rate)
        parts += lines
        for kind, field, unit, factor in (("speed", "seconds", "ms", 1e3), ("memory", "peak_memory", "MB", 1e-6)):
            name, title = f"{path.stem}-{kind}.svg", f"{kind}, forward and backward, {found['gpu']}: shorter is better"
            files[name] = plot(rows, field, unit, factor, title)
            parts.append(f"![{title}](benchmarks/results/{name})")
        parts.append("")
    return "\n".join(parts).rstrip() or NOTHING, files


def readme_with(text: str, readme: str) -> str:
    """README with ``text`` between its markers.

    Raises:
        ValueError: README does not have each marker once, in order.
    """
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ValueError(f"README.md must have {START} and then {END}, once each")
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}"


def main(root: pathlib.Path = ROOT, argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write README's benchmark tables and the plots from the results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is stale")
    check = parser.parse_args(argv).check
    folder = root / "benchmarks" / "results"
    text, files = build(folder)
    wanted = {root / "README.md": readme_with(text, (root / "README.md").read_text())}
    wanted |= {folder / name: content for name, content in files.items()}
    extra = [path for end in ("svg", "md") for path in folder.glob(f"*.{end}") if path not in wanted]
    stale = [p for p, content in wanted.items() if not p.exists() or p.read_text() != content] + extra
    if check:
        for path in stale:
            print(f"{path.relative_to(root)} is not what benchmarks/results says; run python benchmarks/report.py")
        return int(bool(stale))
    for path, content in wanted.items():
        path.write_text(content)
    for path in extra:
        path.unlink()
    print(f"wrote {', '.join(str(p.relative_to(root)) for p in wanted)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
