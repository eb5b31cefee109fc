"""Training: resuming bit for bit, the best epoch on val, what a run folder holds, and what is refused."""

import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsfast.harma import CaptionedImages, evaluate, load_run, train
from rsfast.harma import model as models
from rsfast.harma.optim import adamw
from rsfast.harma.transforms import eval_transform
from tests.harma_world import MODEL, config, in_memory, write_files

TIMING = ("samples_per_second", "data_wait")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(out, **changes):
    data = {key: changes.pop(key, in_memory()) for key in ("train_data", "val_data")}
    return train(config(out, **changes), **data, progress=False)


def lines(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_runs(a, b):
    assert_same(torch.load(a / "last.pt", weights_only=True), torch.load(b / "last.pt", weights_only=True))
    assert lines(a) == lines(b)
    assert json.loads((a / "best.json").read_text()) == json.loads((b / "best.json").read_text())
    for name in ("adapters/adapters.safetensors", "model.safetensors"):
        assert (a / name).is_file() == (b / name).is_file()
        if (a / name).is_file():
            assert_same(load_file(a / name), load_file(b / name))


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        ((0, 0), {}),
        ((0, 2), {}),
        ((0, 0), {"method": "full", "precision": "bf16", "grad_checkpointing": True}),
        ((0, 0), {"precision": "fp16", "skip_padding": True, "share": None}),
    ],
)
def test_resume_is_bit_equal(tmp_path, workers, changes):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert run(straight, workers=workers[0], **changes).steps == 4
    stops = [run(parts, max_steps=1, **changes)]  # inside the first epoch
    torch.rand(3)
    stops.append(run(parts, max_steps=2, resume="latest", workers=workers[1], **changes))  # at its end
    stops.append(run(parts, max_steps=3, resume="latest", **changes))
    assert [(stop.steps, stop.stopped) for stop in stops] == [(1, "max_steps"), (2, "max_steps"), (3, "max_steps")]
    done = run(parts, resume="latest", workers=workers[1], **changes)
    assert (done.steps, done.stopped) == (4, None)
    assert_same_runs(straight, parts)


class Interrupting(CaptionedImages):
    """Sends this process a signal while the first batch is loaded."""

    countdown = [6]

    def load(self, index):
        self.countdown[0] -= 1
        if self.countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().load(index)


def test_a_signal_ends_the_step_and_saves(tmp_path):
    data = in_memory()
    signalling = Interrupting(data.images, data.texts, data.text_to_image, labels=data.labels)
    stopped = run(tmp_path / "a", train_data=signalling)
    assert (stopped.stopped, stopped.steps) == ("SIGTERM", 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tmp_path / "a", resume="latest")
    run(tmp_path / "b")
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_lost_epoch_is_done_again_and_logged_once(tmp_path):
    run(tmp_path / "a", max_steps=3)
    kept = (tmp_path / "a" / "last.pt").read_bytes()
    run(tmp_path / "a", resume="latest")
    (tmp_path / "a" / "last.pt").write_bytes(kept)  # as if the machine had died before the last checkpoint
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # and while it wrote a line
    run(tmp_path / "a", resume="latest")
    run(tmp_path / "b")
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_the_best_epoch_on_val_is_kept(tmp_path):
    val = in_memory(8, 20)
    result = run(tmp_path / "run", epochs=6, lr=0.02, val_data=val)
    means = {line["epoch"]: line["val_r_mean"] for line in lines(tmp_path / "run") if "val_r_mean" in line}
    assert len(means) == 6 and max(means.values()) > means[6]  # or the test could not tell the best from the last
    assert result.best["epoch"] == max(means, key=means.get) and result.best["val_r_mean"] == max(means.values())
    best = load_run(tmp_path / "run")
    found = evaluate(best.model, best.tokenizer, val, progress=False)
    assert {f"val_{name}": value for name, value in found.metrics.items()}.items() <= result.best.items()
    found = evaluate(result.model, result.tokenizer, val, progress=False)
    assert found.metrics["r_mean"] == means[6]


@pytest.mark.parametrize("method", ["harma", "full", "frozen"])
def test_methods(tmp_path, method):
    start = models.create(MODEL, seed=3407)
    result = run(tmp_path / "run", method=method)
    now = load_run(tmp_path / "run").model.state_dict()
    before = start.model.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, now[name])]
    total = sum(p.numel() for p in start.model.parameters())
    if method == "frozen":
        assert (changed, result.trainable_parameters, result.steps) == ([], 0, 0)
        assert result.best["val_r_mean"] == evaluate(*start[:2], in_memory(), progress=False).metrics["r_mean"]
    elif method == "harma":
        assert changed == ["logit_scale"] and 0 < result.trainable_parameters < total
        assert len(now) > len(before) and not (tmp_path / "run" / "model.safetensors").exists()
    else:
        assert len(changed) > len(before) / 2 and result.trainable_parameters == total
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["method"], settings["seed"]) == (method, 3407)


def test_temperature(tmp_path):
    model = models.create(MODEL, seed=0).model
    model.logit_scale.data.fill_(1.0)
    slow = dict(lr=1e-12, epochs=1)
    reset = train(config(tmp_path / "a", **slow), train_data=in_memory(), model=model, progress=False)
    assert reset.model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)  # one rounding to fp32
    model = models.create(MODEL, seed=0).model
    model.logit_scale.data.fill_(1.0)
    kept = train(config(tmp_path / "b", temperature=None, **slow), train_data=in_memory(), model=model, progress=False)
    assert kept.model.logit_scale.item() == 1.0
    assert kept.best == {"step": 2, "epoch": 1}  # without val the last epoch


def test_runs_and_files_as_pretrained(tmp_path):
    for method in ("harma", "full", "frozen"):
        run(tmp_path / method, method=method, epochs=1)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_bytes((tmp_path / "harma" / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="unfinished has no finished epoch yet"):
        run(tmp_path / "x", pretrained=str(tmp_path / "unfinished"), model=None)
    for text in ("[]", "{}", '{"settings": {}, "model": {}, "name": null, "tag": null}'):
        (tmp_path / "unfinished" / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json lacks settings .* rsfast did not write it"):
            load_run(tmp_path / "unfinished")
    still = dict(epochs=1, lr=1e-12, max_steps=1, temperature=None)
    for method in ("harma", "full", "frozen"):  # one step that moves nothing: the run goes on from the other's best
        more = run(tmp_path / f"on_{method}", pretrained=str(tmp_path / method), model=None, **still)
        ours, theirs = (m.state_dict() for m in (more.model, load_run(tmp_path / method).model))
        for name in theirs:
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9), name  # lr 1e-12, one step
    with pytest.raises(NotImplementedError, match="has adapters, and method full cannot start from those"):
        run(tmp_path / "x", pretrained=str(tmp_path / "harma"), method="full")
    with pytest.raises(ValueError, match=r"bottleneck"):
        run(tmp_path / "x", pretrained=str(tmp_path / "harma"), bottleneck=64)
    with pytest.raises(ValueError, match="is not the model of the run"):
        run(tmp_path / "x", pretrained=str(tmp_path / "full"), model=MODEL | {"embed_dim": 8})

    weights = load_file(tmp_path / "full" / "model.safetensors")
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        made = models.create(MODEL, weights=tmp_path / name).model.state_dict()
        assert all(torch.equal(made[key], weights[key]) for key in weights)
    weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    for name, message in (
        ("nan.safetensors", "nan.safetensors holds NaN or infinity in visual.proj"),
        ("other.safetensors", "other.safetensors does not fit the model"),
        ("text.pt", "text.pt does not fit the model"),
        ("some_tag", "'some_tag' is no weights file, run folder or tag"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "x", pretrained=str(tmp_path / name) if "." in name else name)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        run(tmp_path / "x", pretrained=str(tmp_path / "none.pt"))
    assert not (tmp_path / "x").exists()


def test_a_model_of_open_clip_by_name_and_its_traps():
    assert models.read_config("ViT-B-32")[1] == "ViT-B-32"
    with pytest.raises(ValueError, match="open_clip has no 'ViT-Z'"):
        models.read_config("ViT-Z")
    with pytest.raises(ValueError, match="it lacks vision_cfg, text_cfg"):
        models.read_config({"embed_dim": 3})
    with pytest.raises(ValueError, match="vocab_size must be 49408 or more"):
        models.create(MODEL | {"text_cfg": MODEL["text_cfg"] | {"vocab_size": 100}})


def test_a_config_may_name_a_tokenizer_of_hugging_face(monkeypatch):
    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", lambda name, **options: (name, options))
    text = MODEL["text_cfg"] | {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "lower"}}
    made = models.tokenizer(MODEL | {"text_cfg": text}, None)
    assert made == ("a/b", {"context_length": 12, "tokenizer_mode": None, "clean": "lower"})


def test_quickgelu_mismatch_is_refused(monkeypatch):
    monkeypatch.setattr(models, "build", None)
    with pytest.raises(ValueError, match="openai was trained as ViT-B-32-quickgelu"):
        models.create("ViT-B-32", weights="openai")
    with pytest.raises(ValueError, match="laion2b_s34b_b79k' is no .* the tags of ViT-B-32-quickgelu are"):
        models.create("ViT-B-32-quickgelu", weights="laion2b_s34b_b79k")


def test_a_run_needs_no_file_but_its_own(tmp_path):
    weights = models.create(MODEL, seed=5).model.state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "m.json").write_text(json.dumps(MODEL))
    run(tmp_path / "run", model=str(tmp_path / "m.json"), pretrained=str(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").unlink()
    (tmp_path / "m.json").unlink()
    found = load_run((tmp_path / "run").rename(tmp_path / "moved"))
    assert torch.equal(found.model.visual.proj, weights["visual.proj"])


def test_what_a_resumed_run_refuses(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        run(out, resume="latest")
    run(out, max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(FileExistsError, match="holds a run already; --resume latest continues"):
        run(out)
    for changes, message in (
        ({"lr": 0.5, "seed": 1}, "other settings: lr was 0.01, now 0.5; seed was 3407, now 1"),
        ({"method": "full"}, "method was 'harma', now 'full'"),
        ({"train_data": in_memory(1)}, "train_data was"),
        ({"val_data": in_memory(1)}, "val_data was"),
        ({"model": MODEL | {"embed_dim": 8}}, "model is another"),
    ):
        with pytest.raises(ValueError, match=message):
            run(out, resume="latest", **changes)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"last.pt is damaged"):
        run(out, resume="latest")
    torch.save({"step": 1}, out / "last.pt")
    with pytest.raises(ValueError, match=r"last.pt is damaged: it must hold best, broken, "):
        run(out, resume="latest")
    with pytest.raises(FileNotFoundError, match="has no finished epoch yet"):
        load_run(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method must be one of harma, full, frozen, got 'lora'"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"warmup": 1.0}, "warmup must be from 0 to below 1, got 1.0"),
        ({"batch_size": 21}, "batch_size 21 x 1 processes is more than the 20 captions"),
        ({"device": "cuda"} if not torch.cuda.is_available() else {"precision": "int8"}, "device cuda|precision must"),
        ({"device": "gpu"}, "device 'gpu' cannot be used: "),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"margin": float("nan")}, "margin must be finite, got nan"),
        ({"model": None}, "model is needed"),
        ({"model": MODEL | {"vision_cfg": {"foo": 1}}}, "model: open_clip can make none of its config: .*'foo'"),
        ({"num_heads": 5}, "bottleneck must be a multiple"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    run(tmp_path / "run", lr=1e30, max_steps=1, epochs=1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="1 / temperature is 0.0 at step 2; .* checkpoint of before is kept"):
        run(tmp_path / "run", lr=1e30, epochs=1, resume="latest")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_broken_images_stop_nothing_unless_strict(tmp_path):
    files = write_files(tmp_path / "world")
    (files / "images" / "a" / "4.png").write_text("no image")
    (files / "images" / "a" / "7.png").unlink()
    sources = dict(
        train_data=str(files / "train.json"), val_data=str(files / "val.json"), images=str(files / "images"),
        model=str(files / "model.json"), epochs=1,
    )  # fmt: skip
    result = train(config(tmp_path / "run", **sources), progress=False)
    assert result.broken.keys() == {"a/4.png", "a/7.png"} and "not in" in result.broken["a/7.png"]
    assert lines(tmp_path / "run")[-1] == {"step": 2, "broken": result.broken}
    with pytest.raises(ValueError, match=r"an image cannot be used: a/[47].png: "):
        train(config(tmp_path / "strict", strict=True, **sources), progress=False)


def test_evaluation_encodes_as_the_model_does():
    model, tokenizer = models.create(MODEL, seed=1)[:2]
    model.train()
    model.visual.eval()
    data = in_memory(0, 9)  # images 0 and 8 have a caption in common
    found = evaluate(model, tokenizer, data, batch_size=4, progress=False)
    assert model.training and not model.visual.training
    transform = eval_transform(**models.image_settings(model))
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(image) for image in data.images]), normalize=True)
        texts = model.encode_text(tokenizer(data.texts), normalize=True)
    for ours, theirs in ((found.image_features, images), (found.text_features, texts)):
        assert (ours - theirs).abs().max() < 1e-6  # unit norm in fp32, batches of another size
    assert data.texts[1] == data.texts[17] and torch.equal(found.text_features[1], found.text_features[17])
    assert found.text_to_image.tolist() == list(data.text_to_image)


def test_no_decay_for_biases_alone():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "frozen": torch.nn.Linear(2, 2)})
    model.gate = torch.nn.Parameter(torch.zeros(()))
    model["frozen"].requires_grad_(False)
    decayed, kept = adamw(model, lr=1.0, wd=0.04, betas=(0.9, 0.98), eps=1e-8).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"], decayed["betas"]) == (0.04, 0.0, (0.9, 0.98))
    assert {id(p) for p in decayed["params"]} == {id(model.gate), id(model["a"].weight)}
    assert [id(p) for p in kept["params"]] == [id(model["a"].bias)]


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", report_to="tensorboard", epochs=1)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "train/drift_text", "val/r_mean"} <= set(events.Tags()["scalars"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed; pip install 'rsfast\[tensorboard\]'"):
        run(tmp_path / "other", report_to="tensorboard")
    assert run(tmp_path / "other", report_to=None, epochs=1).steps == 2
