"""The one command for a machine with a GPU: its order, its budget, what is kept of a part that fails or is cut off."""

import argparse
import json
import os
import pathlib
import sys
import time

import pytest
import torch

from benchmarks import build, capture, facts, gpu, results, sanitize
from tests.cases import CASES

TOP = dict(gpu="Some GPU", driver="1", torch="2", triton="3", cuda="13", commit="a" * 40, date="2026-01-01T00:00Z")
CLEAN = f"sampled k-means\n{sanitize.DONE}\n========= ERROR SUMMARY: 0 errors\n"
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at one_pass(float *)+0x2d0 in one_pass.cu:88
=========     and Read access at one_pass(float *)+0x330 in one_pass.cu:90 [512 hazards]
=========
========= Warning: Race reported between Write access at other(int *)+0x10
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
BAD_READ = """========= Invalid __global__ read of size 4 bytes
=========     at product_kernel+0x70
=========     by thread (3,0,0) in block (0,0,0)
========= Invalid __global__ read of size 4 bytes
=========     at product_kernel+0x70
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sanitize, "tool", lambda: "/cuda/bin/compute-sanitizer")
    return argparse.Namespace(budget=540.0, k="gated", out=tmp_path / "out", commit="abc")


def started(outcome, options, parts=gpu.PARTS, output=CLEAN):
    seen, kept = {}, {}

    def start(argv, seconds, environment):
        seen[len(seen)] = (argv, seconds, environment)
        return outcome, output

    outcomes = gpu.run(list(parts), options, start, kept.__setitem__)
    assert {part: found["outcome"] for part, found in kept.items()} == outcomes
    return outcomes, dict(zip((p for p in parts if "skipped" not in outcomes[p]), seen.values(), strict=True)), kept


def test_a_gpu_run_goes_through_its_parts_and_leaves_time_for_the_last(options):
    outcomes, calls, _ = started(0, options)
    assert list(outcomes) == list(gpu.PARTS) and set(outcomes.values()) == {"passed"}
    argv = {part: call[0] for part, call in calls.items()}
    assert {"tests/test_contract.py", "tests/test_similarity_small.py", "tests/test_tune.py"} <= set(argv["tests"])
    everything = {str(path.relative_to(gpu.ROOT)) for path in gpu.ROOT.glob("tests/test_*.py")}
    of_tests, of_suite = ({a for a in argv[part] if a.startswith("tests/")} for part in ("tests", "suite"))
    assert of_tests | of_suite == everything and not of_tests & of_suite, "the whole suite, each file once"
    assert argv["build"][-1] == "benchmarks.build" and argv["facts"][2:4] == ["benchmarks.facts", "--out"]
    assert argv["tune"][3:5] == ["tune", "--budget"] and argv["tune"][-2:] == ["--commit", "abc"]
    assert argv["memcheck"][:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    assert argv["racecheck"][2] == "racecheck" and argv["racecheck"][-2:] == argv["sample"][-2:]
    for part in ("ops", "losses", "lora", "kmeans", "deblora", "step"):
        assert f"benchmarks/bench_{part}.py" in argv[part]
        assert argv[part][argv[part].index("--commit") + 1] == "abc" and argv[part][-2:] == ["-k", "gated"]
    steps = {"benchmarks/bench_step.py", "benchmarks/bench_step_lora.py", "benchmarks/bench_step_deblora.py"}
    assert steps <= set(argv["step"]) and not steps & set(argv["lora"] + argv["deblora"])
    given = {part: call[1] for part, call in calls.items()}
    assert given["tests"] == pytest.approx(150, abs=1) and given["losses"] == pytest.approx(60, abs=30)
    assert given["step"] == pytest.approx(480, abs=1), "the suite's 60 s are left"
    assert float(argv["tune"][5]) == pytest.approx(given["tune"] - 30, abs=1), "tune ends by itself"


def test_every_benchmark_belongs_to_a_part(options):
    ours = {a for part in gpu.PARTS for a in gpu.command(part, options, 60) if a.startswith("benchmarks/bench_")}
    assert ours == {str(path.relative_to(gpu.ROOT)) for path in gpu.ROOT.glob("benchmarks/bench_*.py")}


def test_what_little_time_there_is_is_shared(options):
    options.budget = 120.0
    _, calls, _ = started(0, options, ["ops", "losses", "step"])
    assert [call[1] for call in calls.values()] == pytest.approx([40, 60, 120], abs=1)


def test_tests_without_benchmarks_after_them_have_the_rest(options):
    for parts, seconds in ((gpu.PARTS[:6], 540 - 45 - 80 - 50), (["tests"], 540), (["tests", "racecheck", "ops"], 150)):
        assert started(0, options, parts)[1]["tests"][1] == pytest.approx(seconds, abs=1)
    options.budget = 200.0
    assert started(0, options, gpu.PARTS[:6])[1]["tests"][1] == pytest.approx(150, abs=1), "as much as ever"


def test_builds_are_shared_and_only_benchmarks_see_what_was_tuned(options):
    (options.out / "rsfast/lora").mkdir(parents=True)
    (options.out / "rsfast/lora/h200.json").write_text("{}")
    homes = {part: pathlib.Path(gpu.environment(part, options.out)["XDG_CACHE_HOME"]) for part in gpu.PARTS}
    (homes["build"] / "rsfast/csrc/cuda-1").mkdir(parents=True)
    for part, home in homes.items():
        assert (home / "rsfast/csrc/cuda-1").is_dir(), part
        tuned = part in ("ops", "losses", "tune", "lora", "kmeans", "deblora", "step")
        assert (home / "rsfast/lora/h200.json").exists() == tuned, part
    assert not (options.out / "rsfast/csrc").exists(), "objects of a build are no results"


def test_a_failing_part_is_said_and_the_others_go_on(options, monkeypatch):
    monkeypatch.setattr(sanitize, "tool", lambda: None)
    outcomes, calls, kept = started(1, options, output="tests/a.py::t[x y] FAILED [ 50%]\n")
    assert outcomes["tests"] == "FAILED with 1" and kept["tests"]["names"] == ["tests/a.py::t[x y]"]
    assert outcomes["memcheck"] == outcomes["racecheck"] == "skipped: compute-sanitizer is not installed"
    assert "step" in calls and kept["build"]["error"].startswith("tests/a.py")


def test_a_cut_off_part_keeps_what_it_said(options):
    assert started(None, options, ["ops"], "")[0] == {"ops": "cut off"}
    outcomes, _, kept = started(None, options, ["tests"], "tests/a.py::t PASSED\n[gw1] [ 9%] FAILED tests/a.py::u \n")
    assert outcomes == {"tests": "FAILED, and cut off"}
    assert kept["tests"]["passed"] == kept["tests"]["failed"] == 1 and kept["tests"]["names"] == ["tests/a.py::u"]
    options.budget = 5.0
    assert started(0, options, ["tests"])[0] == {"tests": "skipped: no time left"}


def test_tests_are_counted_once_however_they_are_told(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n@pytest.mark.parametrize('v', ['a b', 'c (d)'])\ndef test_a(v): assert v == 'a b'\n"
        "def test_b(): pytest.skip('no (such) thing [1%]')\n@pytest.fixture\ndef bad(): 1 / 0\ndef test_c(bad): pass\n"
    )
    argv = [sys.executable, "-m", "pytest", "-v", "-rfEs", "-p", "no:cacheprovider", str(tmp_path)]
    wanted = dict(failed=1, errors=1, passed=1, skipped=1)
    for more in (["--rootdir", str(tmp_path)], ["-n", "2"]):
        code, output = gpu.start([*argv, *more], 60, {"OMP_NUM_THREADS": "1"}, tmp_path / "log")
        found = gpu.counted(output)
        assert code == 1 and {name: found[name] for name in wanted} == wanted, output
        assert any(name.endswith("test_a[c (d)]") for name in found["names"]) and len(found["names"]) == 2
        assert found["reasons"] == {"no (such) thing [1%]": 1}
        assert output in (tmp_path / "log").read_text()


def test_a_part_that_outlasts_its_time_is_interrupted_then_ended(tmp_path, capsys):
    def start(script, seconds, **environment):
        return gpu.start([sys.executable, "-uc", script], seconds, environment, tmp_path / "log")

    asleep = "import time\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('what was found')"
    assert start(asleep, 2.0) == (None, "what was found\n")
    deaf = "import signal, time\nsignal.signal(2, lambda *_: None)\nprint('deaf')\nwhile True: time.sleep(1)"
    assert start(deaf, 1.5) == (None, "deaf\n")
    assert start("import os; print(os.environ['MARK']); raise SystemExit(3)", 30, MARK="x PASSED") == (3, "x PASSED\n")
    assert capsys.readouterr().out == "what was found\ndeaf\n", "what passed is for the log alone"


ROWS = [f"benchmarks/bench_ops.py::bench_op[{name}-1x2]" for name in "abc"]


@pytest.mark.parametrize(
    "code, last",
    [
        (
            2,
            f"FAILED [ 3%]\n!!! _pytest.outcomes.Exit: {capture.LOST}: an illegal memory access\nFAILED {ROWS[1]}\n",
        ),
        (-11, "Fatal Python error: Segmentation fault\n"),
        (1, "Timeout (0:02:50)!\nThread 0x1 (most recent call first)\n"),
    ],
)
def test_rows_after_one_that_takes_its_process_with_it_are_measured(options, code, last):
    runs = [(code, f"{ROWS[0]} PASSED [ 1%]\n{ROWS[1]} {last}"), (0, f"{ROWS[2]} PASSED [100%]\n")]
    begun = []

    def start(argv, seconds, environment):
        begun.append(argv[argv.index("--after") + 1] if "--after" in argv else None)
        return runs[len(begun) - 1]

    kept = {}
    outcomes = gpu.run(["ops"], options, start, kept.__setitem__)
    assert begun == [None, ROWS[1]] and outcomes == {"ops": f"FAILED with {code}"}
    assert kept["ops"]["passed"] == 2 and kept["ops"]["names"] == [ROWS[1]]


def test_rows_that_merely_fail_or_are_cut_off_begin_nothing_anew(options):
    for code in (1, None):
        begun = []
        gpu.run(["ops"], options, lambda *_, c=code: begun.append(1) or (c, f"{ROWS[0]} FAILED\n"))  # noqa: B023
        assert len(begun) == 1
    begun = []
    gpu.run(["ops"], options, lambda *_: begun.append(1) or (-11, "a segmentation fault before any row"))
    assert len(begun) == 1


@pytest.mark.parametrize("ends", ("assert False", "import pytest; pytest.skip('peer failed')"))
def test_a_row_that_spoils_the_gpu_ends_its_process_and_the_next_one_begins_after_it(tmp_path, ends):
    (tmp_path / "bench_x.py").write_text(
        "import torch\nfrom benchmarks import capture\ntorch.cuda.is_available = lambda: True\n"
        "capture.healthy = lambda: None\n"
        "def spoilt(): raise RuntimeError('an illegal memory access\\nmore')\n"
        "def bench_a(): assert True\n"
        f"def bench_b():\n    if True:\n        capture.healthy = spoilt\n        {ends}\n"
        "def bench_c(): pass\n"
    )
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "benchmarks.conftest"]
    argv += ["-c", str(gpu.ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    code, output = gpu.start(argv, 60, {}, tmp_path / "log")
    assert code == 2 and f"{capture.LOST}: an illegal memory access" in output, output
    assert "bench_b" in output and "bench_c" not in output, output
    assert ("assert False" in output) == (ends == "assert False"), "what failed is told"
    code, output = gpu.start([*argv, "--after", "bench_x.py::bench_b"], 60, {}, tmp_path / "log")
    assert code == 0 and "bench_c PASSED" in output and "2 deselected" in output, output
    code, output = gpu.start([*argv, "--until", "1"], 60, {}, tmp_path / "log")
    assert code == 0 and "3 skipped" in output, output


def test_a_test_that_spoils_the_gpu_fails_no_other(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest, torch\ntorch.cuda.is_initialized = lambda: True\nlost = []\n"
        "def wait():\n    if lost: raise RuntimeError('an illegal memory access')\ntorch.cuda.synchronize = wait\n"
        "@pytest.mark.parametrize('n', range(12))\n"
        "def test_a(n):\n    if n == 2: lost.append(1)\n    assert not lost\n"
    )
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "tests.conftest", "-n", "2"]
    argv += ["-c", str(gpu.ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    code, output = gpu.start(argv, 100, {"OMP_NUM_THREADS": "1"}, tmp_path / "log")
    found = gpu.counted(output)
    assert code == 1 and found["passed"] == 11 and len(found["names"]) == 1, output
    assert found["names"][0].endswith("test_x.py::test_a[2]")
    assert "assert not lost" in output, "why it failed is told"


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_only_a_report_at_the_end_of_the_sample_is_clean(tool):
    clean = (
        CLEAN
        if tool == "memcheck"
        else f"{sanitize.DONE}\n"
        + RACE[RACE.index("========= RACECHECK") :].replace(
            "2 hazards displayed (1 error, 1 warning)", "0 hazards displayed (0 errors, 0 warnings)"
        )
    )
    assert gpu.said(tool, 0, clean)[0] == "passed"
    assert gpu.said(tool, 0, clean.replace(sanitize.DONE, ""))[0] == "FAILED with 0"
    assert gpu.said(tool, 0, sanitize.DONE)[0] == "FAILED with 0, without a report"
    assert gpu.said(tool, 1, clean)[0] == "FAILED with 1", "the sample itself failed"
    assert gpu.said(tool, None, "")[0] == "cut off"


def test_what_a_sanitizer_found_is_parsed():
    outcome, report = gpu.said("racecheck", 1, RACE + sanitize.DONE)
    assert outcome == "FAILED: 1 errors, 1 warnings" and (report["errors"], report["warnings"]) == (1, 1)
    assert len(report["kinds"]) == 2 and any("one_pass.cu:88" in kind for kind in report["kinds"])
    outcome, report = gpu.said("memcheck", 1, BAD_READ + sanitize.DONE + "\n========= ERROR SUMMARY: 2 errors\n")
    assert outcome == "FAILED: 2 errors, 0 warnings"
    assert report["kinds"] == {"Invalid __global__ read of size 4 bytes": 2}
    assert gpu.said("memcheck", None, BAD_READ)[0] == "FAILED: 2 reports before its end"
    refused = "========= Error: Device not supported. Please refer to the manual\n"
    assert gpu.said("memcheck", 255, refused)[0].startswith("skipped: Error: Device not supported")


def test_the_sanitizer_is_found_beside_nvcc(tmp_path, monkeypatch):
    for name in ("bin/nvcc", "compute-sanitizer/compute-sanitizer"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sanitize._sources, "nvcc", lambda: str(tmp_path / "bin/nvcc"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert sanitize.tool() == str(tmp_path / "compute-sanitizer/compute-sanitizer")
    (tmp_path / "bin/compute-sanitizer").symlink_to(tmp_path / "compute-sanitizer/compute-sanitizer")
    assert sanitize.tool() == str(tmp_path / "bin/compute-sanitizer")
    monkeypatch.setenv("PATH", str(tmp_path / "compute-sanitizer"))
    assert sanitize.tool() == str(tmp_path / "compute-sanitizer/compute-sanitizer")


def test_the_sanitizers_see_every_kind_of_kernel(options):
    assert {"harma_loss_ids", "batched_lora_linear_dropout_qv"} < set(sanitize.SAMPLE)
    assert set(sanitize.SAMPLE) <= {case.name for case in CASES}
    watched = gpu.environment("memcheck", options.out)
    assert watched["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1", "or the ends of tensors lie inside larger blocks"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in gpu.environment("sample", options.out)


def test_a_build_is_timed_by_part(monkeypatch, tmp_path, capsys):
    place = tmp_path / "rsfast/csrc/cuda-1"
    place.mkdir(parents=True)
    (place / "build.ninja").write_text("")
    (place / ".ninja_log").write_text("# ninja log v6\n10\t2510\t0\tone_pass.cuda.o\tff\n10\t9010\t0\tfit.cuda.o\tff\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build._extension, "library", lambda: None)
    assert build.main() == 0
    outcome, kept = gpu.said("build", 0, capsys.readouterr().out)
    assert outcome == "passed" and kept == {"units": {"fit.cuda.o": 9.0, "one_pass.cuda.o": 2.5}}

    def fails():
        raise NotImplementedError("nvcc is not found")

    monkeypatch.setattr(build._extension, "library", fails)
    assert build.main() == 1
    outcome, kept = gpu.said("build", 1, capsys.readouterr().out)
    assert outcome == "FAILED with 1" and "nvcc is not found" in kept["error"]


def test_facts_are_written_as_they_come_and_one_that_fails_ends_nothing(tmp_path, capsys):
    writer = results.Writer(tmp_path, TOP)
    seen = []

    def second():
        seen.append(json.loads((tmp_path / "some-gpu.json").read_text())["facts"])
        return {"b": "cudnn"}

    groups = {"first": lambda: {"a": 1.0}, "wrong": lambda: 1 / 0, "second": second}
    assert facts.run(groups, writer.facts) == ["wrong"]
    assert seen == [{"a": 1.0}] and results.read(tmp_path / "some-gpu.json")["facts"] == {"a": 1.0, "b": "cudnn"}
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_kernels_of_the_facts_compute_what_they_should(device):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 40, generator=g).to(device) for rows in (70, 37))
    for tma in (False, True):
        found = facts.triton_product(a, b, (32, 16, 32, 4, 2), tma)
        error = ((found.double() - a.double() @ b.double().T).norm() / found.double().norm()).item()
        assert error < (1e-6 if device == "cpu" else 2e-3), "TF32 on a GPU"
    x, out = torch.arange(700, dtype=torch.int32, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    facts.read_kernel[(3,)](x, out, 700, BLOCK=128)
    assert out.sum().item() == x.sum().item() and out.count_nonzero() == 3
    counters = torch.zeros(4, dtype=torch.int32, device=device)
    facts.barriers_kernel[(1,)](counters, TIMES=4)
    assert counters.tolist() == [1] * 4


def test_kernels_are_compiled_while_other_parts_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    begun, Popen = [], gpu.subprocess.Popen

    def start(argv, **options):
        begun.append((argv, options["env"]))
        script = "import time; print('{}\\nTraceback', flush=True); time.sleep(60)"
        process = Popen([sys.executable, "-c", script], **options)
        begun.append(process)
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with gpu.ahead(tmp_path):
        (argv, environment), process = begun
        assert argv[:2] == ["nice", "-n"] and argv[4:7] == ["-m", "tests.aot", "90"] and process.poll() is None
        assert environment["CUDA_VISIBLE_DEVICES"] == "" and "TRITON_INTERPRET" not in environment
        for _ in range(300):
            if "Traceback" in (tmp_path / gpu.COMPILED).read_text():
                break
            time.sleep(0.1)
    assert process.poll() is not None, "it does not outlive the run"
    assert "1 launches compiled" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_without_a_gpu_nothing_is_started(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["step,nonsense", ""])
def test_parts_that_are_not_known_are_named(monkeypatch, wrong, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", wrong])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--only takes build, facts, tests" in capsys.readouterr().err


def test_the_whole_command_with_every_part_stubbed(monkeypatch, tmp_path, capsys):
    """From the command line to the results: each part is a program of its own, one fails, one writes a row."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (1, 0))
    monkeypatch.setattr(sanitize, "tool", lambda: "sanitizer")
    monkeypatch.setattr(results, "provenance", lambda commit: TOP | {"commit": commit})
    row = dict(family="adapter", op="o", shape="1", dtype="d", impl="fused", seconds=1.0) | {"pass": "forward"}
    row |= {name: TOP[name] for name in results.PROVENANCE}
    scripts = dict.fromkeys(gpu.PARTS, "print('tests/a.py::t PASSED')") | {
        "memcheck": f"print({BAD_READ!r})", "racecheck": f"print({CLEAN!r})", "build": "print('compiled x.o in 2.0 s')",
        "ops": f"import os, pathlib\nfrom benchmarks import results\nresults.Writer(pathlib.Path({str(tmp_path)!r}), "
               f"{TOP!r}).add({row!r})\nos._exit(2)",
    }  # fmt: skip
    monkeypatch.setattr(gpu, "command", lambda part, args, seconds, after: [sys.executable, "-c", scripts[part]])
    only = "build,tests,memcheck,racecheck,ops,suite"
    argv = ["gpu", "--out", str(tmp_path), "--commit", "abc", "--only", only, "--budget", "200"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(gpu.ROOT), os.environ.get("PYTHONPATH", "")]))
    assert gpu.main() == 1
    found = results.read(tmp_path / "some-gpu.json")
    assert {part: check["outcome"] for part, check in found["checks"].items()} == {
        "build": "passed", "tests": "passed", "memcheck": "FAILED: 2 reports before its end", "racecheck": "passed",
        "ops": "FAILED with 2", "suite": "passed",
    }  # fmt: skip
    assert found["checks"]["build"]["units"] == {"x.o": 2.0} and found["checks"]["suite"]["passed"] == 1
    assert len(found["rows"]) == 1 and found["checks"]["ops"]["commit"] == "abc"
    assert "== build" in capsys.readouterr().out and "x.o" in (tmp_path / gpu.LOG).read_text()
