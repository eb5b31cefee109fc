"""Every row that a GPU run would write, made up, through the tables, the plots and the list of outcomes."""

import random

import pytest

from benchmarks import (
    arms,
    bench_deblora,
    bench_step,
    bench_step_deblora,
    bench_step_lora,
    kmeans,
    lora,
    lora_attention,
    lora_memory,
    losses,
    outcomes,
    report,
    results,
)
from benchmarks.arms import BF16, short
from benchmarks.measure import PASSES

TOP = dict(gpu="Some GPU", driver="1", torch="2", triton="3", cuda="13", commit="a" * 40, date="2026-01-01T00:00Z")
NO_TIME = ("seconds", "wall_seconds", "beside_seconds", "bytes")


@pytest.fixture
def rows(monkeypatch):
    for module in (arms, kmeans, lora, losses):
        monkeypatch.setattr(module, "DEVICE", "cuda")
    rng, rows = random.Random(0), []

    def add(family, op, shape, dtype, impl, which, **more):
        seconds = rng.uniform(1e-5, 1e-2)
        key = dict(family=family, op=op, shape=short(shape), dtype=short(dtype), impl=impl) | {"pass": which}
        times = {name: seconds for name in ("seconds", "p10_seconds", "p90_seconds", "beside_seconds")}
        if which != "forward":
            more |= dict(saved_memory=10)
        if family != "step":
            more |= dict(wall_seconds=seconds)
        row = dict(
            bytes=10**8, flops=10**10, peak_memory=10**8, method="graph", iqr_seconds=0.0, rounds=50, sm_mhz=None
        )
        rows.append(key | row | times | more | {name: TOP[name] for name in results.PROVENANCE})

    for name, shape, dtype, impl in arms.grid():
        for which in PASSES:
            add("adapter", name, shape, dtype, impl, which)
    for name, shape, dtype, impl, which in losses.grid():
        more = dict(gemm_seconds=1e-3) if dtype == BF16 else {}
        add("similarity", name, shape, dtype, impl, which, error_loss=0.0, error_image_features=1e-3, **more)
    for main in (True, False):
        for name, shape, impl, which in lora.grid(main):
            more = {"target": 2.0} if lora.target(name, shape, impl, which) else {}
            add("lora", name, shape, BF16, impl, which, error_y=1e-3, beside="auto", **more)
        for name, shape, dtype, impl in kmeans.grid(main):
            more = dict(floor_seconds=1e-4, error_labels=0.0) | kmeans.aims(name, shape, dtype, impl)
            add("kmeans", name, shape, dtype, impl, "forward", **more)
    for impl in lora_attention.IMPLEMENTATIONS:
        add("lora", "lora_attention_r16", (256, 50, 768), BF16, impl, "forward", error_y=1e-3)
    for impl in lora_memory.IMPLEMENTATIONS:
        add("lora", "lora_memory", (256, 257, 1024), BF16, impl, "memory", kept_for_lora=9, kept_without=99)
        rows[-1] = {name: v for name, v in rows[-1].items() if name not in NO_TIME} | {
            "peak_memory": None,
            "bytes": None,
        }
    for op, shapes, impls in (
        ("harma_vit_b_32", ((214,), (428,)), bench_step.STEPS),
        ("lora_vit_l_14", ((64,), (128,)), bench_step_lora.STEPS),
        ("deblora_clustering", ((1_000_000, 1280, 32),), (*bench_step_deblora.OURS, *bench_step_deblora.OTHERS)),
    ):
        for shape in shapes:
            for impl in impls:
                add("step", op, shape, BF16, impl, "step", samples_per_second=1e3, bytes=None)
    for impl in bench_deblora.IMPLS:
        add("deblora", "calibrate", (1_000_000, 1280, 15), BF16, impl, "forward", error=0.0)
    return rows


def test_readme_shows_the_recipes_and_a_file_beside_the_results_shows_everything(rows, tmp_path):
    facts = {"copy_bytes_per_second": 4e12}
    results.write(tmp_path / "some-gpu.json", TOP | {"facts": facts, "checks": {}, "rows": rows})
    text, files = report.build(tmp_path)
    assert 60 < len(text.splitlines()) < 200 and "[every row](benchmarks/results/some-gpu.md)" in text
    whole = files["some-gpu.md"]
    for row in rows:
        if row["pass"] in report.SHOWN and row["family"] in ("lora", "kmeans"):
            assert f"{row['op']}, {row['shape']}, {row['dtype']}" in whole
    for op in {row["op"] for row in report.of_recipes(rows)} - {"lora_memory"} | {"kmeans_plusplus", "tower 256x"}:
        assert op in whole and (op in text) == (op != "kmeans_plusplus")
    for pattern in report.RECIPES:
        names = (" ".join(row[n] for n in ("op", "shape", "dtype", "pass")) for row in rows)
        assert any(report.fnmatchcase(name, pattern) for name in names), f"{pattern} names nothing that is timed"
    assert all(files[f"some-gpu-{kind}.svg"].count("<rect") < 200 for kind in ("speed", "memory"))


def test_little_is_shown_whole(rows, tmp_path):
    few = [row for row in rows if row["op"] == "kmeans_plusplus"]
    results.write(tmp_path / "some-gpu.json", TOP | {"facts": {}, "checks": {}, "rows": few})
    text, files = report.build(tmp_path)
    assert "kmeans_plusplus" in text and "every row" not in text and "some-gpu.md" not in files


def test_every_prediction_is_about_a_row_that_is_timed(rows):
    table = outcomes.table(rows)
    assert len(table) > 60 and not [line for line in table if line.endswith("|  |  |  |")]


def test_what_a_compiler_does_better_is_found_in_every_family(rows):
    for row in rows:
        if row["impl"].endswith("-compiled"):
            row |= dict(seconds=1e-9)
    lines = "\n".join(outcomes.losing(rows))
    for op in (
        "gated_adapter,",
        "contrastive_loss,",
        "lora_linear_r16,",
        "kmeans_step,",
        "harma_vit_b_32,",
        "calibrate,",
    ):
        assert op in lines
