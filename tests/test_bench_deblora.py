"""What debLoRA's measurements on a CPU measure, and that README says what their files say."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import deblora_cpu
from rsfast.deblora import FeatureStore

ROOT = pathlib.Path(__file__).parent.parent
README, NOTES = ((ROOT / name).read_text() for name in ("README.md", "benchmarks/NOTES.md"))


def test_the_store_is_long_tailed(tmp_path):
    deblora_cpu.make_store(str(tmp_path / "store"), 1000, 8, at_once=300)
    store = FeatureStore(tmp_path / "store")
    counts = np.bincount(store.labels)
    assert len(store) == 1000 and store.dtype == np.float16 and len(counts) == 15
    assert (np.diff(counts) <= 0).all() and counts[0] > 90 * counts[-1] > 0


@pytest.mark.skipif(not deblora_cpu.PEAK.exists(), reason="Linux alone says what a process held at most")
def test_streaming_is_measured_in_a_process_of_its_own(monkeypatch):
    rows = deblora_cpu.memory(2000, 64, memory_limit=2**10)
    assert [row["rho"] for row in rows] == [2.0, None]
    for row in rows:
        found = row["bytes"]
        assert list(found) == ["features", "imports", *deblora_cpu.STAGES] and found["features"] == 2 * 2000 * 64
        assert found["imports"] > 2**24 and 0 <= found["clusters"] <= found["centers"] <= found["calibrated"] < 2**29
    with pytest.raises(Exception, match="returned non-zero exit status"):
        deblora_cpu.memory(2000, 64, memory_limit=2**40)  # which would fit in memory: nothing is streamed


@pytest.mark.skipif(not deblora_cpu.PEAK.exists(), reason="Linux alone says what a process held at most")
def test_memory_is_seen():
    code = "import numpy; from benchmarks.deblora_cpu import peak; a = peak(); numpy.ones(2**26); print(peak() - a)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 2**28 < int(done.stdout) < 2**30  # given back at once, and a process of its own has held no more before


def test_the_comparison_is_kept_without_what_is_of_the_machine(tmp_path, monkeypatch):
    from tests.test_deblora_run import blobs

    data = blobs()
    np.savez(tmp_path / "f.npz", features=data.features, label=data.labels, is_test=data.is_test, classes=data.classes)
    monkeypatch.setattr(deblora_cpu, "IMBALANCE", 20)
    monkeypatch.setattr(sys, "argv", ["deblora_cpu", "aid", str(tmp_path / "f.npz")])
    monkeypatch.setattr(deblora_cpu, "AID", tmp_path / "aid.json")
    few = dict(clusters=4, rank=2, epochs=1, deblora_epochs=1)
    monkeypatch.setattr("rsfast.deblora.RunConfig", lambda **given: run_config(**given | few))
    from rsfast.deblora.comparison.config import RunConfig as run_config

    deblora_cpu.main()
    text = (tmp_path / "aid.json").read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text and "seconds" not in text
    assert found["settings"]["imbalance"] == 20 and found["settings"]["data"] and len(found["rows"]) == 3 * (6 + 1)
    assert all(row["C"] > 0 for row in found["rows"])


def test_a_line_of_the_table():
    rows = [dict(method=m, target_set=t, head=h, middle=2, tail=3, mean=4)
            for m in deblora_cpu.METHODS for t, h in (("balanced", 1), ("balanced", 2), ("all", 90))]  # fmt: skip
    assert deblora_cpu.table(rows)[2] == "| `zero-shot` | 1.5 ± 0.7 | 2.0 ± 0.0 | 3.0 ± 0.0 | 4.0 ± 0.0 |"


def test_readme_has_the_table_of_the_file():
    rows = json.loads(deblora_cpu.AID.read_text())["rows"]
    assert "\n".join(deblora_cpu.table(rows)) in README
    found = {(row["target_set"], row["method"], row["seed"]): row for row in rows}
    for key, decimals in ((("all", "deblora", 0), 1), (("balanced", "zero-shot", 0), 2)):
        assert f"{found[key]['tail']:.1f} (C = {found[key]['C']:.{decimals}f})" in README


def test_notes_have_the_memory_of_the_file():
    rows = json.loads(deblora_cpu.MEMORY.read_text())["rows"]
    assert "\n".join(f"  {line}" for line in deblora_cpu.memory_table(rows)) in NOTES
    assert [row["rows"] for row in rows] == [n for n in deblora_cpu.ROWS for _ in "ab"]
