"""The whole demo in a small size, and what it promises to write."""

import argparse
import dataclasses
import json
import math
import shutil

import pytest
import torch
from PIL import Image

from rsfast import cli, harma, models
from rsfast.harma import demo
from rsfast.harma.measure import Measure, resident_memory

TINY = dict(everyday_scenes=26, scenes=13, test_scenes=14, foundation_epochs=1, epochs=2, device="cpu")


def parse(*argv):
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *argv])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("parent") / "demo"
    return out, demo.run_demo(out, **TINY)


def test_results_hold_what_is_printed(done):
    out, results = done
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["rows"]) == ["zero_shot", "harma", "full"]
    for row in results["rows"].values():
        assert all(0 <= row[name] <= 100 for name in demo.RECALLS)
        assert row["r_mean"] == pytest.approx(sum(row[name] for name in demo.RECALLS[:6]) / 6)
    rows = results["rows"]
    assert rows["zero_shot"]["trainable_parameters"] == 0 == rows["zero_shot"]["seconds"]
    assert 0 < rows["harma"]["trainable_parameters"] < 0.06 * rows["full"]["trainable_parameters"]
    assert rows["full"]["trainable_parameters"] == results["foundation"]["parameters"]
    for method in ("harma", "full"):
        assert rows[method]["seconds"] > 0 and rows[method]["best_epoch"] in (1, 2)
        if resident_memory() is not None:
            assert rows[method]["peak_memory_bytes"] > 0
    assert results["reload"] == results["reload"] | {"bit_equal": True, "image_features": True, "text_features": True}
    assert results["scenes"]["aerial_test"] == 14 and results["seconds"] > 0


def test_both_methods_saw_the_same(done):
    out, results = done
    settings = [json.loads((out / run / "config.json").read_text())["settings"] for run in ("harma", "full")]
    differing = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differing == {"method", "lr", "out"}
    data = [json.loads((out / run / "config.json").read_text()) for run in ("harma", "full")]
    assert data[0]["train_data"] == data[1]["train_data"] and data[0]["val_data"] == data[1]["val_data"]


def test_the_test_scenes_on_disk_give_the_same_numbers(done):
    out, results = done
    run = harma.load_run(out / "harma")
    data = harma.load_captions(out / "test.json", out / "test.zip")
    found = harma.evaluate(run.model, run.tokenizer, data, progress=False)
    assert {name: found.metrics[name] for name in demo.RECALLS} == {
        name: results["rows"]["harma"][name] for name in demo.RECALLS
    }


def test_pictures_are_written(done):
    out, _ = done
    for name in ("retrieval.png", "scenes.png"):
        with Image.open(out / name) as picture:
            assert picture.width >= 1000 and len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_adapters_that_change_on_disk_fail_the_demo(tmp_path, monkeypatch, capsys):
    def spoilt(model, folder):
        with torch.no_grad():
            model.logit_scale.add_(1)
            next(p for name, p in model.named_parameters() if name.endswith("up.bias")).add_(0.1)
        return save(model, folder)

    save = models.save_adapters
    monkeypatch.setattr(models, "save_adapters", spoilt)
    small = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY | {"epochs": 1}).items()]
    args = parse("--out", str(tmp_path), *small)
    assert args.run(args) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["reload"]["bit_equal"] is False


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "harma").mkdir()
    (tmp_path / "harma" / "thesis.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["harma", "thesis.txt"]


def test_an_interrupt_ends_the_demo_and_not_just_one_training(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        return dataclasses.replace(train(*args, **kwargs), stopped="SIGINT")

    train = demo.train
    monkeypatch.setattr(demo, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, **TINY)
    assert not (tmp_path / "full").exists()


def test_an_earlier_demo_is_replaced(done, tmp_path):
    copy = shutil.copytree(done[0], tmp_path / "copy")
    (copy / "harma" / "left.txt").write_text("over")
    demo._claim(copy)
    assert not (copy / "harma").exists() and (copy / "results.json").is_file()


@pytest.mark.parametrize("name", ["everyday_scenes", "scenes", "test_scenes", "foundation_epochs", "epochs", "seed"])
def test_too_small_numbers_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        demo.run_demo(tmp_path / "out", **TINY | {name: -1})
    assert not (tmp_path / "out").exists()


def test_defaults_of_the_command_are_those_of_the_function():
    args = parse()
    assert {name: getattr(args, name) for name in demo.run_demo.__kwdefaults__ if name != "device"} == {
        name: value for name, value in demo.run_demo.__kwdefaults__.items() if name != "device"
    }


def test_chance_is_what_random_orders_give():
    chance = demo._chance(12, 60)
    generator = torch.Generator().manual_seed(0)
    found = [
        harma.retrieval_metrics(
            torch.randn(12, 60, generator=generator),
            torch.randn(60, 60, generator=generator),
            torch.arange(12).repeat_interleave(5),
        )
        for _ in range(300)
    ]
    for name in demo.RECALLS:
        values = torch.tensor([metrics[name] for metrics in found])
        # six standard errors of the mean: one false alarm in hundreds of millions
        assert abs(values.mean() - chance[name]) < 6 * values.std() / math.sqrt(len(values)), name


@pytest.mark.skipif(resident_memory() is None, reason="the system does not tell a process's memory")
def test_memory_is_the_peak_above_what_was_held():
    before = torch.ones(2**24)  # 64 MiB, held all the time
    with Measure() as measured:
        held = torch.ones(2**24)
        torch.ones(2**23).add_(held[: 2**23])  # 32 MiB more, given back
        del held
    assert before.sum() == 2**24
    assert 64 * 2**20 <= measured.peak_memory < 112 * 2**20  # the second peak may be too short to be seen
    assert measured.seconds > 0
