"""From a measurement to README: the results file, the table, the plots."""

import json
import pathlib
import xml.etree.ElementTree as ET

import pytest
import torch

from benchmarks import floors, outcomes, report, results
from benchmarks.arms import ADAPTERS, TIMED, caption_lengths, grid
from benchmarks.measure import DeviceClock

TOP = dict(gpu="Some GPU", driver="1", torch="2", triton="3", cuda="13", commit="a" * 40, date="2026-01-01T00:00Z")
EMPTY = f"# A library\n{report.START}\n{report.END}\nThe end.\n"


def a_row(**fields):
    row = dict(
        family="adapter", op="gated_adapter", shape="256x50x768", dtype="bfloat16", impl="harma",
        seconds=0.002, bytes=40_000_000, flops=9, peak_memory=5_000_000,
    )  # fmt: skip
    return row | {"pass": "forward+backward"} | fields


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text(EMPTY)
    return tmp_path


def write(root, rows, **top):
    writer = results.Writer(root / "benchmarks" / "results", TOP | top)
    writer.facts({"copy_bytes_per_second": 4e12})
    for row in rows:
        writer.add(row)
    return writer.path


def test_every_row_is_on_disk_as_soon_as_it_is_measured(root):
    writer = results.Writer(root, TOP)
    for n, impl in enumerate(("harma", "fused", "reference"), 1):
        writer.add(a_row(impl=impl))
        assert len(results.read(root / "some-gpu.json")["rows"]) == n
    assert [p.name for p in root.glob("some-gpu*")] == ["some-gpu.json"], "a half-written file was left"


def test_the_newest_of_each_row_is_kept_with_what_measured_it(root):
    path = write(root, [a_row(seconds=2.0), a_row(impl="fused", seconds=1.0)])
    write(root, [a_row(seconds=3.0)], date="2026-02-01T00:00Z", commit="b" * 40)
    found = results.read(path)
    rows = {row["impl"]: row for row in found["rows"]}
    assert {impl: (row["seconds"], row["commit"][0]) for impl, row in rows.items()} == {
        "harma": (3.0, "b"),
        "fused": (1.0, "a"),
    }
    assert found["commit"] == "b" * 40 and found["facts"] == {"copy_bytes_per_second": 4e12}


def test_folding_in_an_older_file_replaces_nothing_newer():
    def content(date, seconds):
        row = a_row(seconds=seconds) | {name: TOP[name] for name in results.PROVENANCE} | {"date": date}
        return TOP | {"date": date, "rows": [row]}

    old, new = content("2026-01-01T00:00Z", 1.0), content("2026-03-01T00:00Z", 2.0)
    for folded in (results.fold(old, new), results.fold(new, old)):
        assert folded["date"] == new["date"] and [row["seconds"] for row in folded["rows"]] == [2.0]


@pytest.mark.parametrize("key", ["family", "op", "shape", "dtype", "impl", "pass"])
def test_rows_that_differ_in_any_part_of_the_key_are_two(root, key):
    path = write(root, [a_row(), a_row(**{key: "other"})])
    assert len(results.read(path)["rows"]) == 2


@pytest.mark.parametrize("text, said", [("{", "no JSON"), ('{"gpu": "x"}', "driver")])
def test_a_broken_results_file_is_named(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        results.read(tmp_path / "x.json")
    assert "x.json" in str(error.value)


def test_without_results_nothing_is_claimed(root, capsys):
    assert report.main(root, []) == 0
    text = (root / "README.md").read_text()
    assert "No GPU run yet" in text and "|" not in text
    assert text.startswith("# A library\n") and text.endswith("The end.\n")


def test_the_table_says_what_was_measured(root):
    write(root, [
        a_row(), a_row(impl="fused", seconds=0.00002, peak_memory=1_000_000),
        a_row(impl="fused", **{"pass": "backward"}),
        a_row(family="step", op="harma_vit_b_32", shape="214", impl="rsfast", bytes=None, **{"pass": "step"}),
    ])  # fmt: skip
    report.main(root, [])
    lines = (root / "README.md").read_text().splitlines()
    head, row = (next(line for line in lines if word in line) for word in ("| harma |", "256x50x768"))
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["harma"] == "2.000" and cells["fused"] == "**0.020**"
    assert cells["GB/s (% of copy)"] == "2000 (50 %)"
    assert cells["peak memory, MB"] == "5 → 1"
    assert sum("256x50x768" in line for line in lines) == 1, "the backward pass is left to the results file"
    assert any("harma_vit_b_32" in line and "**2.000**" in line for line in lines)


def test_the_steps_table_has_rates_and_ratios(root):
    common = dict(family="step", op="harma_vit_b_32", shape="428", bytes=None) | {"pass": "step"}
    path = write(root, [
        a_row(impl="rsfast", seconds=0.1, samples_per_second=4280.0, **common),
        a_row(impl="harma", seconds=0.2, beside_seconds=0.08, samples_per_second=2140.0, **common),
        a_row(impl="auto", seconds=3.0, **common | dict(op="deblora_clustering", shape="1000000x1280x32")),
    ])  # fmt: skip
    results.Writer(path.parent, TOP).check("memcheck", {"outcome": "passed", "errors": 0, "warnings": 0})
    results.Writer(path.parent, TOP).check("tests", {"outcome": "FAILED with 1", "passed": 9, "failed": 1})
    report.main(root, [])
    text = (root / "README.md").read_text()
    assert "| harma_vit_b_32, 428, bfloat16 | **rsfast** | **100.000** | 4280 |  | 5 | aaaaaaaa |" in text
    assert "| harma_vit_b_32, 428, bfloat16 | harma | 200.000 | 2140 | 2.50 | 5 | aaaaaaaa |" in text
    assert "| deblora_clustering, 1000000x1280x32, bfloat16 | **auto** | **3000.000** |  |  | 5 | aaaaaaaa |" in text
    assert "tests: FAILED with 1 (9 passed, 1 failed); memcheck: passed (0 errors)." in text


def test_what_was_checked_without_a_row_is_said_too(root):
    results.Writer(root / "benchmarks" / "results", TOP).check("racecheck", {"outcome": "cut off"})
    report.main(root, [])
    assert (
        "### Some GPU" in (root / "README.md").read_text() and "racecheck: cut off" in (root / "README.md").read_text()
    )


def a_loss(impl, seconds, **fields):
    row = a_row(family="similarity", op="contrastive_loss", shape="65536x512", impl=impl, seconds=seconds)
    return row | dict(error_loss=1e-7, error_image_features=2e-3, error_text_features=3e-3, gemm_seconds=0.024) | fields


def test_the_losses_table_has_ratios_shares_and_errors(root):
    write(root, [
        a_loss("fused", 0.03), a_loss("memeff", 0.09, beside_seconds=0.04),
        a_loss("cce", 0.02, error_text_features=0.7, beside_seconds=0.03), a_loss("fused", 1.0, **{"pass": "forward"}),
        a_loss("reference", 0.5, dtype="float32"),
    ])  # fmt: skip
    report.main(root, [])
    lines = (root / "README.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| loss, shape"))
    cells = {
        line.split(" | ")[1]: dict(zip(head.split(" | "), line.split(" | "), strict=True))
        for line in lines
        if line.startswith("| contrastive_loss, 65536x512")
    }
    assert list(cells) == ["cce", "**fused**", "memeff", "reference"], "fastest first, one dtype after the other"
    assert cells["**fused**"]["ms"] == "**30.000**" and cells["**fused**"]["times ours"] == "1.00"
    assert cells["**fused**"]["four GEMMs"] == "80 %" and cells["memeff"]["four GEMMs"] == "27 %"
    assert cells["memeff"]["times ours"] == "2.25", "against ours in the same rounds, not in ours' own row"
    assert cells["cce"]["ms"] == "20.000" and cells["cce"]["error"] == "7e-01, wrong", "wrong is never the fastest"
    assert cells["memeff"]["error"] == "3e-03" and cells["reference"]["times ours"] == ""


def a_layer(impl, seconds, **fields):
    row = a_row(family="lora", op="lora_linear_r16", shape="50432x768x768", impl=impl, seconds=seconds)
    return row | dict(error_y=2e-3, error_lora_A=3e-3, saved_memory=8_000_000) | fields


def test_the_lora_table_has_ratios_targets_and_errors(root):
    write(root, [
        a_layer("auto", 0.0012, beside_seconds=0.001, beside="frozen", target=1.28),
        a_layer("frozen", 0.0011, beside_seconds=0.0013), a_layer("fused", 0.0013, beside_seconds=0.0012),
        a_layer("peft-bf16", 0.0022, beside_seconds=0.0011, target=1.9),
        a_layer("bmm", 0.0005, error_lora_A=0.7), a_layer("auto", 1.0, **{"pass": "forward"}),
        a_layer("peft-bf16", 0, op="lora_memory", kept_for_lora=40_000_000, kept_without=3, **{"pass": "memory"}),
        a_layer("auto", 0, op="lora_memory", kept_for_lora=5_000_000, kept_without=3, target=10., **{"pass": "memory"}),
    ])  # fmt: skip
    report.main(root, [])
    lines = (root / "README.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| layer, shape"))
    cells = {
        line.split(" | ")[1]: dict(zip(head.split(" | "), line.split(" | "), strict=True))
        for line in lines
        if line.startswith("| lora_linear_r16") and "forward+backward" in line
    }
    assert list(cells) == ["bmm", "frozen", "**auto**", "**fused**", "peft-bf16"], "fastest first"
    ours, theirs = cells["**auto**"], cells["peft-bf16"]
    assert ours["ms"] == "**1.200**" and cells["bmm"]["ms"] == "0.500" and cells["frozen"]["ms"] == "1.100"
    assert ours["times ours"] == "1.00" and theirs["times ours"] == "2.00", "against ours in the same rounds"
    assert ours["over frozen"] == "1.20" and theirs["over frozen"] == "2.00", "ours against frozen in the same rounds"
    assert ours["target"] == "≤ 1.28 over frozen" and theirs["target"] == "≥ 1.9" and cells["frozen"]["target"] == ""
    assert cells["bmm"]["error"] == "7e-01, wrong" and ours["error"] == "3e-03" and ours["saved, MB"] == "8"
    assert cells["frozen"]["times ours"] == "0.85"
    kept = [line for line in lines if line.startswith("| tower 50432x768x768")]
    assert [line.split(" | ")[1:5] for line in kept] == [
        ["**auto**", "5", "1.00", "≥ 10"], ["peft-bf16", "40", "8.00", ""],
    ]  # fmt: skip
    assert sum("lora_linear_r16" in line and line.endswith(" |") for line in lines) == 6


def test_plots_are_well_formed_and_longest_is_slowest(root):
    write(root, [a_row(), a_row(impl="fused", seconds=0.001)])
    report.main(root, [])
    for kind in ("speed", "memory"):
        path = root / "benchmarks" / "results" / f"some-gpu-{kind}.svg"
        assert path.name in (root / "README.md").read_text()
        svg = ET.parse(path).getroot()
        bars = [float(bar.get("width")) for bar in svg.iter("{http://www.w3.org/2000/svg}rect") if bar.get("x")]
        assert bars == ([420.0, 210.0] if kind == "speed" else [420.0, 420.0])


def test_check_fails_where_anything_is_stale(root, capsys):
    path = write(root, [a_row()])
    assert report.main(root, ["--check"]) == 1 and (root / "README.md").read_text() == EMPTY
    assert report.main(root, []) == 0 and report.main(root, ["--check"]) == 0
    found = json.loads(path.read_text())
    found["rows"][0]["seconds"] = 0.5
    path.write_text(json.dumps(found))
    assert report.main(root, ["--check"]) == 1
    assert "README.md" in capsys.readouterr().out
    report.main(root, [])
    path.unlink()
    assert report.main(root, ["--check"]) == 1, "plots of a file that is gone"


def test_readme_without_markers_is_refused_and_kept(root):
    (root / "README.md").write_text("# no markers\n")
    with pytest.raises(ValueError, match="benchmarks:start"):
        report.main(root, [])
    assert (root / "README.md").read_text() == "# no markers\n"


def test_readme_is_what_the_results_say(capsys):
    assert report.main(report.ROOT, ["--check"]) == 0, capsys.readouterr().out


def test_every_kernel_of_a_timed_case_is_timed():
    timed = {(name, impl) for name, _, _, impl in grid()}
    assert timed >= {(name, impl) for name in ADAPTERS for impl in ("fused", "reference", "reference-compiled")}
    assert timed >= {("gated_adapter_shared", impl) for impl in ("harma", "harma-sdpa", "harma-compiled")}


def test_captions_are_as_long_as_real_ones():
    lengths = caption_lengths(20000)
    assert lengths.max() <= 37 and abs(lengths.float().mean() - 12.5) < 0.3
    assert abs((lengths <= 18).float().mean() - 0.9) < 0.02


def test_work_is_counted_as_the_design_counts_it():
    """FLOPs a token of the four cases, from the design's table."""
    for name, shape, per_token in (
        ("gated_adapter", (1, 50, 768), 706_560),
        ("gated_adapter", (1, 197, 768), 857_088),
        ("gated_adapter", (1, 257, 1024), 1_049_600),
        ("gated_adapter_shared", (1, 77, 512), 688_384),
    ):
        assert TIMED[name].flops(shape) == per_token * shape[1]
    padded, short = (TIMED[f"gated_adapter_shared{kind}"].flops((64, 77, 512)) for kind in ("", "_captions"))
    assert 0 < short < padded / 4


def test_notes_hold_each_kernels_floor_prediction_and_outcome():
    text = floors.NOTES.read_text()
    assert text == outcomes.notes_with_table(text), "run python -m benchmarks.outcomes"
    known = {op for op, *_ in [(aim.op,) for aim in outcomes.aims()]}
    assert {"gated_adapter", "contrastive_loss", "lora_linear_r16", "kmeans_step"} <= known
    for aim in outcomes.aims():
        assert aim.seconds is None or aim.floor is None or aim.floor < aim.seconds, aim
    row = a_loss("fused", 0.04) | {"commit": "b" * 40}
    peers = [a_loss("memeff", 0.09, beside_seconds=0.045, commit="c" * 40), a_loss("open_clip", 0.2, commit="d" * 40)]
    lines = [line for line in outcomes.table([row, *peers]) if "contrastive_loss, 65536x512" in line]
    name = "| contrastive_loss, 65536x512, bfloat16, forward+backward | 22.3 "
    assert lines[0] == f"{name}| ≤ 30 ms | 40 ms (56% of the floor) | missed: 75% of it | bbbbbbbb |"
    assert f"{name}| ≥ 3 times memeff | 2.00 | missed: 67% of it | cccccccc |" in lines
    assert f"{name}| ≥ 4 times open_clip | 5.00 | met | dddddddd |" in lines
    assert f"{name}| ≥ 15 times inf-cl |  |  |  |" in lines


def test_kernels_that_lose_to_the_compiler_are_named():
    assert outcomes.losing([]) == ["Nothing has been measured."]
    ours, theirs = a_row(impl="fused", peak_memory=6_000_000), a_row(impl="reference-compiled", commit="b" * 40)
    line = "- gated_adapter, 256x50x768, bfloat16, forward+backward: 2 ms and 6 MB; reference-compiled 2 ms and 5 MB"
    assert outcomes.losing([ours | {"commit": "a" * 40}, theirs]) == [f"{line} (aaaaaaaa)"]
    for better in ({"seconds": 0.0019}, {"peak_memory": 4_999_999}, {"pass": "forward"}):
        assert outcomes.losing([ours | {"commit": "a"} | better, theirs]) == ["None of those that were measured."], (
            better
        )
    slow = theirs | {"seconds": 0.003, "beside_seconds": 0.0031}
    assert outcomes.losing([ours | {"commit": "a"}, slow]) != ["None of those that were measured."], "run in turn"
    others = [a_row(impl=impl, seconds=0.001) for impl in ("harma", "rsfast-compiled", "reference")]
    assert outcomes.losing([ours | {"commit": "a"}, *others]) == ["None of those that were measured."]


def test_notes_hold_the_floors_of_the_formulas():
    assert floors.NOTES.read_text() == floors.notes_with_table(), "run python -m benchmarks.floors"
    assert floors.exponentials("gated_adapter", (1, 50, 768)) == 800 * 50
    assert floors.exponentials("gated_adapter_shared", (1, 77, 512)) == 1848 * 77
    assert (
        "| contrastive_loss | 65536x512 | 403 | 4 | 17.6 | 8.59 | 0.0936 | 22.3 | 2.32 | 22.3 |" in floors.loss_table()
    )
    layers = {name for name in TIMED if "lora_linear" in name}
    assert set(floors.LOSSES) == set(TIMED) - set(ADAPTERS) - layers and len(layers) == 2
    assert "| lora_linear_r16 | 65792x1024x1024 | forward | 274 | 142 | 97 % | 64 | 180 | 180 |" in floors.lora_table()


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_the_clock_is_a_clock_without_a_gpu():
    clock = DeviceClock()
    assert clock() < clock()


def test_what_a_run_checked_is_kept_and_replaced_by_the_next(root, monkeypatch):
    path = write(root, [a_row()])
    for date, outcome in (("2026-02-01T00:00Z", "FAILED with 1"), ("2026-02-01T00:05Z", "passed")):
        monkeypatch.setattr(results, "now", lambda date=date: date)
        results.Writer(path.parent, TOP).check("memcheck", {"outcome": outcome, "errors": 0})
        results.Writer(path.parent, TOP).check("tests", {"outcome": "passed"})
        write(root, [a_row(impl=outcome)], date="2026-02-01T00:02Z")  # a part's own top is newer than its run's
    found = results.read(path)
    assert found["checks"]["memcheck"] == {
        "outcome": "passed", "errors": 0, "commit": "a" * 40, "date": "2026-02-01T00:05Z",
    }  # fmt: skip
    assert set(found["checks"]) == {"memcheck", "tests"} and len(found["rows"]) == 3 and found["facts"]


def test_results_stand_where_report_looks():
    assert results.FOLDER == report.ROOT / "benchmarks" / "results" == pathlib.Path(results.__file__).parent / "results"
