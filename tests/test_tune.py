"""``rsfast tune``: what it times, what it writes, and what its command says."""

import argparse
import json
import types

import pytest
import torch

from rsfast import cli, info, tune
from rsfast.lora.kernels import plan
from tests.case import BF16
from tests.test_tune_timing import combinations

CPU = torch.device("cpu")
FACTS = plan.Facts(50432, 768, 768, 16, 1, 0, False, BF16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No table but those that a test writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan, "TABLES", tmp_path / "shipped")
    plan.table_of.cache_clear()
    yield tmp_path
    plan.table_of.cache_clear()


def a_table(**top):
    return tune.Table(plan.user_table("none"), "none", **top)


class Measure:
    """Takes one second off for each place in the list; the fastest is the last one that is right."""

    def __init__(self, broken=()):
        self.seen, self.broken = [], broken

    def __call__(self, facts, stages, choices):
        self.seen.append((facts, stages))
        seconds = {i: 1e-3 * (len(choices) - i) for i in range(len(choices)) if i not in self.broken}
        reasons = {i: "RuntimeError: too large" for i in self.broken if i < len(choices)}
        return max(seconds) if 0 in seconds else None, seconds, reasons


def run(layers, table, measure, budget=100.0, **options):
    return list(tune.tune(layers, table, measure, budget, **options))


def test_the_fastest_of_each_stage_is_what_runs():
    table = a_table(capability=90, commit="abc")
    lines = run([FACTS], table, Measure())
    assert [line.split()[0] for line in lines] == ["forward", "dgrad", "factor"]
    for stages in tune.GROUPS:
        for stage, choice in zip(stages, combinations(FACTS, stages)[-1], strict=True):
            assert plan.choose(stage, FACTS, CPU, False) == choice != plan.COMPOSED
    other = plan.Facts(50432, 1024, 768, 16, 1, 0, False, BF16)
    assert plan.choose("forward", other, CPU, False) == plan.COMPOSED, "no table speaks of it"
    found = json.loads(plan.user_table("none").read_text())
    assert {name: found[name] for name in ("gpu", "capability", "commit", "torch")} == {
        "gpu": "none", "capability": 90, "commit": "abc", "torch": torch.__version__.split("+")[0],
    }  # fmt: skip
    seconds = found["choices"][FACTS.key("forward")]["seconds"]
    assert seconds["composed"] == 10e-3 and seconds["inside 64x128x64/4/4"] == 1e-3 and len(seconds) == 10
    assert lines[0].endswith("inside 64x128x64/4/4, 1000.0 us; composed 10000.0 us")


def test_what_was_timed_is_not_timed_again():
    first, second, third = Measure(), Measure(), Measure()
    run([FACTS], a_table(), first)
    assert run([FACTS], a_table(), second) == [] and not second.seen
    assert len(first.seen) == 3 and len(run([FACTS], a_table(), third, again=True)) == 3 == len(third.seen)


def test_other_versions_are_timed_again_and_what_they_said_stays_until_then():
    run([FACTS], a_table(), Measure())
    path = plan.user_table("none")
    found = json.loads(path.read_text())
    for versions in found["measured"].values():
        versions["triton"] = "3.5.0"
    path.write_text(json.dumps(found))
    measure = Measure()
    run([FACTS], a_table(), measure, budget=-1.0)
    assert not measure.seen and json.loads(path.read_text()) == found
    run([FACTS], a_table(), measure)
    assert len(measure.seen) == 3 and "3.5.0" not in path.read_text()


def test_a_command_cut_off_keeps_what_is_done():
    class Interrupted(Measure):
        def __call__(self, *args):
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().__call__(*args)

    with pytest.raises(KeyboardInterrupt):
        run([FACTS], a_table(), Interrupted())
    path = plan.user_table("none")
    assert set(plan.read_table(path)) == {FACTS.key(stage) for stage in ("forward", "dgrad", "low")}
    assert [p.name for p in path.parent.iterdir()] == ["none.json"], "a half-written file was left"
    measure = Measure()
    run([FACTS], a_table(), measure)
    assert [stages for _, stages in measure.seen] == [("factor",)]


def test_the_budget_ends_it_and_says_what_is_left():
    times, measure = iter((0.0, 0.0, 4.0, 6.0, 7.0, 8.0)), Measure()
    layers = [FACTS, plan.Facts(50432, 512, 512, 16, 1, 0, False, BF16)]
    lines = run(layers[:], a_table(), measure, budget=5.0, clock=lambda: next(times, 9.0))
    assert len(measure.seen) == 2 and lines[-1].startswith("the budget is spent: 4 more to time")


def test_sizes_of_one_bucket_are_timed_once_and_what_has_no_choice_never():
    dropout = plan.Facts(50432, 768, 768, 16, 1, 0, True, BF16)
    assert len(plan.candidates("factor", dropout)) == 1
    measure = Measure()
    run([dropout, plan.Facts(60000, 768, 768, 16, 1, 0, True, BF16)], a_table(), measure)
    assert [stages for _, stages in measure.seen] == [("forward",), ("dgrad", "low")]
    assert {facts.rows for facts, _ in measure.seen} == {50432}
    run([dropout, dropout], a_table(), measure, again=True)
    assert len(measure.seen) == 4


def test_what_cannot_run_is_said_and_left_out():
    table = a_table()
    lines = run([FACTS], table, Measure(broken=(1, 9)))
    assert lines[:2] == [
        "  augmented is left out: RuntimeError: too large",
        "  inside 64x128x64/4/4 is left out: RuntimeError: too large",
    ]
    entry = table.content["choices"][FACTS.key("forward")]
    assert entry["BLOCK_M"] == 128 and "augmented" not in entry["seconds"]
    lines = run([FACTS], a_table(), Measure(broken=(0,)), again=True)
    assert any(line.endswith("not tuned, for there is nothing to compare with") for line in lines)
    assert table.content["choices"] == json.loads(plan.user_table("none").read_text())["choices"]


def test_a_broken_table_is_moved_aside(capsys):
    path = plan.user_table("none")
    path.parent.mkdir(parents=True)
    path.write_text('{"choices": {"x": {"arm": "composed"}}}')
    table = a_table()
    assert "none.json is no table of rsfast tune" in capsys.readouterr().err
    assert path.with_name("none.json.broken").exists() and not path.exists() and table.content["choices"] == {}


def test_what_the_library_brings_is_taken_along(cache):
    shipped = plan.TABLES / "none.json"
    shipped.parent.mkdir()
    entry = vars(plan.Choice("augmented")) | {"seconds": {}}
    shipped.write_text(json.dumps({"choices": {"of another size": entry}}))
    run([FACTS], a_table(), Measure())
    assert set(plan.read_table(plan.user_table("none"))) > {"of another size"}
    shipped.write_text("{")
    plan.user_table("none").unlink()
    assert a_table().content["choices"] == {} and shipped.exists(), "it is not ours to move"


def test_what_matters_most_comes_first():
    layers = tune.everything(tune.SHAPES, (16, 8), BF16)
    assert layers[0] == plan.Facts(65792, 1024, 1024, 16, 1, 0, False, BF16)
    assert [(f.dropout, f.adapters) for f in layers[:12]] == [(False, 0)] * 4 + [(True, 0)] * 4 + [(False, 8)] * 4
    assert {f.rank for f in layers[: len(layers) // 2]} == {16} and len(layers) == len(set(layers))
    assert {(f.contracted, f.outputs) for f in layers if f.parts == 3} == {(768, 2304), (1024, 3072)}
    assert {(f.dropout, f.adapters) for f in layers} == {(False, 0), (True, 0), (False, tune.ADAPTERS)}


def test_layers_of_a_model():
    assert tune.shapes_of("ViT-B-32", 256) == [
        (12800, 768, 768), (12800, 768, 2304), (12800, 768, 3072), (12800, 3072, 768),
        (19712, 512, 512), (19712, 512, 1536), (19712, 512, 2048), (19712, 2048, 512),
    ]  # fmt: skip
    assert tune.shapes_of("ViT-L-14", 2)[0] == (514, 1024, 1024)
    with pytest.raises(ValueError, match="open_clip knows no 'ViT-X'"):
        tune.shapes_of("ViT-X", 1)
    for other in ("RN50", "ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32"):
        with pytest.raises(ValueError, match="give --shapes"):
            tune.shapes_of(other, 1)


# --- the command


def arguments(*argv):
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers())
    return parser.parse_args(["tune", *argv])


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("rsfast: tune needs a GPU, and none is visible")
    assert not plan.user_table("none").exists()


@pytest.mark.parametrize("argv, said", (
    (("--rank", "0"), "--rank must be 1 to 256"), (("--model", "ViT-X"), "open_clip knows no 'ViT-X'"),
    (("--budget", "0"), "--budget positive"),
))  # fmt: skip
def test_bad_arguments_are_one_line(capsys, argv, said):
    assert cli.main(["tune", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ("1,2", "1,2,0", "a,b,c", "1,2,3,4"))
def test_a_bad_shape_is_refused(capsys, text):
    with pytest.raises(SystemExit) as stopped:
        arguments("--shapes", text)
    assert stopped.value.code == 2 and "--shapes" in capsys.readouterr().err


def test_the_command_tunes_what_it_is_told(monkeypatch, capsys):
    gpu = types.SimpleNamespace(
        is_available=lambda: True, get_device_capability=lambda: (9, 0), get_device_name=lambda: "NVIDIA H200"
    )
    monkeypatch.setattr(tune.torch, "cuda", gpu)
    args = arguments(
        "--shapes", "100,32,48", "--model", "ViT-B-32", "--batch-size", "2", "--rank", "4", "--commit", "c"
    )
    measure = Measure()
    assert tune.main(args, measure) == 0
    assert {(f.rows, f.rank) for f, _ in measure.seen} == {(100, 4), (154, 4)}, "small batches share a bucket"
    path = plan.user_table("NVIDIA H200")
    found = json.loads(path.read_text())
    assert (found["capability"], found["commit"], found["gpu"]) == (90, "c", "NVIDIA H200")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"writing {path}" and len(out) == 1 + len(measure.seen)


def test_info_names_the_table_in_use(monkeypatch):
    assert tune.table_in_use(CPU) == "untuned: composed"
    run([FACTS], a_table(), Measure())
    assert tune.table_in_use(CPU) == str(plan.user_table("none"))
    one = types.SimpleNamespace(name="X", total_memory=2**30, major=9, minor=0)
    world = dict(device_count=lambda: 1, is_available=lambda: False, get_device_name=lambda device: "X")
    with monkeypatch.context() as pretended:
        pretended.setattr(torch, "cuda", types.SimpleNamespace(**world, get_device_properties=lambda i: one))
        gpus = info._gpus()
    text = info.as_text(
        {"versions": {"torch": "2"}, "gpus": gpus, "cuda_library": "none", "operations": {}, "warnings": []}
    )
    assert "lora table" in text and "untuned: composed, for X" in text
    monkeypatch.setattr(tune, "HAS_TRITON", False)
    assert tune.table_in_use(CPU) == "untuned: composed"
