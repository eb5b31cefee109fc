"""The command line: exit codes, one clear line for the user, files written, pictures."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from rsfast import cli
from rsfast.harma import evaluate, load_captions, load_run
from rsfast.harma.figure import BLUE, GREEN, RED, draw
from tests.harma_world import in_memory, write_files

SEVEN = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("world"), count=12)


def train_arguments(world, out, *more):
    return [
        "harma", "train", "--train-data", str(world / "train.json"), "--val-data", str(world / "val.json"),
        "--images", str(world / "images.zip"), "--model", str(world / "model.json"), "--method", "harma",
        "--epochs", "1", "--batch-size", "8", "--lr", "1e-2", "--precision", "bf16", "--workers", "0",
        "--bottleneck", "32", "--num-heads", "4", "--report-to", "none", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(train_arguments(world, out)) == 0
    return out


def eval_arguments(world, run, *more):
    return [
        "harma", "eval", "--data", str(world / "val.json"), "--images", str(world / "images"),
        "--checkpoint", str(run), "--workers", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def test_eval_prints_the_row_and_writes_json(world, trained, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert cli.main(eval_arguments(world, trained, "--json", str(path))) == 0
    found = json.loads(path.read_text())
    run = load_run(trained)
    expected = evaluate(run.model, run.tokenizer, load_captions(world / "val.json", world / "images"), progress=False)
    assert {name: found[name] for name in SEVEN} == {name: expected.metrics[name] for name in SEVEN}
    assert found["r_mean"] == pytest.approx(sum(found[name] for name in SEVEN[:-1]) / 6)
    assert (found["images"], found["texts"], found["broken"]) == (12, 24, {})
    out = capsys.readouterr().out
    assert [float(x) for x in re.findall(r"\d+\.\d\d", out.splitlines()[3])] == [round(found[x], 2) for x in SEVEN]
    assert "12 images and 24 captions" in out


def test_training_says_what_it_did(world, tmp_path, capsys):
    assert cli.main(train_arguments(world, tmp_path / "run", "--max-steps", "2")) == 0
    assert (
        "stopped by max_steps after step 2; the same command with --resume latest continues" in capsys.readouterr().out
    )
    assert cli.main(train_arguments(world, tmp_path / "run", "--resume", "latest")) == 0
    captured = capsys.readouterr()
    assert "trainable parameters, 3 steps" in captured.out and "best on val: epoch 1" in captured.out
    assert "samples/s, waiting for data" in captured.err


def test_the_rest_of_the_objective(world, tmp_path, capsys):
    weights = ("--uniformity-weight", "0.5", "--affiliation-weight", "0.25", "--drift-weight", "2", "--max-steps", "1")
    arguments = train_arguments(world, tmp_path / "run", "--log-every-n-steps", "1", *weights)
    assert cli.main(arguments) == 0
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    parts = [line[name] for name in ("contrastive", "triplet", "uniformity", "affiliation", "drift")]
    weighed = sum(weight * part for weight, part in zip((1, 1, 0.5, 0.25, 2), parts, strict=True))
    assert line["loss"] == pytest.approx(weighed, rel=1e-6)  # fp32
    assert line["uniformity"] == pytest.approx((line["uniformity_image"] + line["uniformity_text"]) / 2, rel=1e-6)
    assert (line["drift_image"], line["drift_text"]) == (0, 0) and 0 < line["alignment"] < 4
    bare = str(world / "val.json")  # without labels
    assert cli.main([*train_arguments(world, tmp_path / "x", "--train-data", bare), *weights]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        f"rsfast: affiliation_weight above 0 needs a scene label of every image, but {bare} has none"
    )
    assert not (tmp_path / "x").exists()


def test_figure_has_right_wrong_and_truth(world, trained, tmp_path):
    path = tmp_path / "out.png"
    assert cli.main(eval_arguments(world, trained, "--figure", str(path))) == 0
    there = colours(path)
    assert all(there.get(colour, 0) > 500 for colour in (GREEN, RED, BLUE))
    run, data = load_run(trained), in_memory(0, 8)
    found = evaluate(run.model, run.tokenizer, data, progress=False)
    eye = torch.eye(len(found.images))  # features that find everything, and features that find nothing but others
    perfect = dict(image_features=eye, text_features=eye[found.text_to_image])
    draw(path, type(found)(**(vars(found) | perfect)), data, queries=8)
    rights = colours(path)[GREEN]
    draw(path, type(found)(**(vars(found) | perfect | {"text_features": -eye[found.text_to_image]})), data, queries=8)
    assert colours(path).get(GREEN, 0) == 0 and colours(path)[RED] > rights


def colours(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return {colour: count for count, colour in picture.getcolors(maxcolors=2**24)}


def test_broken_images_are_listed_at_the_end(world, trained, tmp_path, capsys):
    files = write_files(tmp_path / "world", count=12)
    (files / "images" / "a" / "3.png").write_text("no image")
    arguments = eval_arguments(files, trained, "--json", str(tmp_path / "out.json"))
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "11 images and 22 captions" in captured.out
    assert "1 images or captions could not be used:\n  a/3.png: UnidentifiedImageError" in captured.err
    assert json.loads((tmp_path / "out.json").read_text())["broken"].keys() == {"a/3.png"}
    assert cli.main([*arguments, "--strict"]) == 2
    assert "rsfast: an image cannot be used: a/3.png: Unidentified" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w, r, t: eval_arguments(w, t), "is no run folder"),
        (lambda w, r, t: eval_arguments(w, r, "--json", str(t / "no" / "out.json")), "json: there is no folder"),
        (lambda w, r, t: eval_arguments(w, r, "--figure", str(t / "out.jpg")), "figure must end in .png"),
        (lambda w, r, t: train_arguments(w, r), "holds a run already"),
        (lambda w, r, t: train_arguments(w, t / "x", "--batch-size", "999"), "is more than the 24 captions"),
        (lambda w, r, t: train_arguments(w, t / "x", "--train-data", str(t / "no.json")), "there is no caption file"),
        (lambda w, r, t: train_arguments(w, t / "x", "--model", "RN50"), "visual"),
        (lambda w, r, t: train_arguments(w, t / "x", "--drift-weight", "-1"), "drift_weight must be 0 or more, got -1"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(world, trained, tmp_path, capsys, make, message):
    assert cli.main(make(world, trained, tmp_path)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rsfast: ") and message in last
    assert not (tmp_path / "x").exists()


def test_bugs_keep_their_traceback(world, trained, monkeypatch):
    def raise_far_away(*arguments, **options):
        torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr("rsfast.harma.evaluation.evaluate", raise_far_away)
    with pytest.raises(RuntimeError):
        cli.main(eval_arguments(world, trained))
    monkeypatch.setattr("rsfast.harma.evaluation.evaluate", lambda *a, **o: int("three"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(eval_arguments(world, trained))


def test_unknown_flags_and_values_exit_2(capsys):
    for arguments in ([], ["harma"], ["harma", "train"], ["harma", "train", "--out", "x", "--method", "lora"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from rsfast import cli\n"
        "try: cli.main(['harma', 'train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'open_clip', 'torchvision', 'timm', 'triton'} & set(sys.modules)"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert "--grad-checkpointing" in done.stdout and "(default: 214)" in done.stdout
    words = " ".join(done.stdout.split())
    assert "near the frozen model's features (default: 0.0)" in words and "MISSING" not in words


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert "versions" in json.loads(capsys.readouterr().out)


def test_a_reader_that_leaves_early_is_no_error():
    root = pathlib.Path(__file__).parents[1]
    code = "import sys; from rsfast import cli; sys.exit(cli.main(['info']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_demo_is_a_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--help"])
    assert stopped.value.code == 0 and "usage: rsfast demo" in capsys.readouterr().out
