"""Adapters on disk."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsfast.models import add_adapters, load_adapters, remove_adapters, save_adapters
from tests.tiny_clip import (
    CUSTOM,
    SIZE,
    assert_unchanged,
    features,
    inputs,
    snapshot,
    stir,
    tiny_clip,
    tiny_custom_text_clip,
)


def trained(make=tiny_clip, **options):
    model = make()
    add_adapters(model, **{**SIZE, **options})
    stir(model).logit_scale.data.fill_(3.5)
    return model


def assert_same_adapters(a, b):
    a, b = ({n: p for n, p in m.named_parameters() if ".adapter." in n or n == "logit_scale"} for m in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].requires_grad == b[name].requires_grad, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": "text", "skip_padding": True},
        {"share": None, "freeze": False},
        {"towers": ("text",), "bottleneck": 64},
        {"towers": ["text", "visual"]},
    ],
)
@pytest.mark.parametrize("make", [tiny_clip, tiny_custom_text_clip])
def test_round_trip(tmp_path, make, options):
    model = trained(make, **options)
    expected = features(model, *inputs())
    save_adapters(model, tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["adapters.json", "adapters.safetensors"]

    fresh = make()
    before = snapshot(fresh)
    report = load_adapters(fresh, tmp_path / "new" / "folder")
    assert_same_adapters(fresh, model)
    for a, b in zip(features(fresh, *inputs()), expected, strict=True):
        assert torch.equal(a, b)
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for block in [*model.visual.transformer.resblocks, *getattr(model, "text", model).transformer.resblocks]:
        if hasattr(block, "adapter"):
            block.adapter.down.weight.data.zero_()
    load_adapters(model, tmp_path / "new" / "folder")  # into the same adapters
    assert_same_adapters(fresh, model)
    if options.get("freeze", True):
        remove_adapters(fresh)
        assert_unchanged(fresh, before)  # logit_scale is the one from before loading


def test_each_tensor_is_stored_once(tmp_path):
    model = trained()
    save_adapters(model, tmp_path)
    tensors = load_file(tmp_path / "adapters.safetensors")
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(tensors) == len(trainable) and sum(t.numel() for t in tensors.values()) == sum(
        p.numel() for p in trainable
    )
    assert {"visual.2.shared.gate", "text.1.residual_gate", "logit_scale"} <= tensors.keys()
    assert not [name for name in tensors if name.startswith("text.") and ".shared." in name]


def test_clip_and_custom_text_clip_exchange_adapters(tmp_path):
    save_adapters(trained(), tmp_path)
    model = tiny_custom_text_clip()
    load_adapters(model, tmp_path)
    save_adapters(model, tmp_path / "again")
    for name in ("adapters.json", "adapters.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_weights_are_cast_to_the_model(tmp_path):
    save_adapters(trained(), tmp_path)
    model = tiny_clip().double()
    load_adapters(model, tmp_path)
    assert model.visual.transformer.resblocks[0].adapter.down.weight.dtype == torch.float64
    assert model.logit_scale.dtype == torch.float64 and model.logit_scale.item() == 3.5


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch, call):
    save_adapters(trained(), tmp_path)
    before = (tmp_path / "adapters.safetensors").read_bytes()

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, full_disk)
    other = trained()
    other.logit_scale.data.fill_(1)
    with pytest.raises(OSError, match="no space"):
        save_adapters(other, tmp_path)
    assert (tmp_path / "adapters.safetensors").read_bytes() == before
    assert len(os.listdir(tmp_path)) == 2


def test_saving_needs_adapters(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save_adapters(tiny_clip(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


WRONG_MODELS = {
    "width": (lambda: tiny_clip(vision={"width": 48}), r"model\.visual\.width is 32 in the file and 48 here"),
    "depth": (lambda: tiny_clip(text={"layers": 3}), r"model\.text\.blocks is 2 in the file and 3 here"),
    "heads": (lambda: tiny_clip(text={"heads": 4}), r"model\.text\.heads is 2 in the file and 4 here"),
    "block": (lambda: tiny_clip(text=CUSTOM), r"model\.text\.block is 'ResidualAttentionBlock'.*'Custom"),
    "activation": (lambda: tiny_clip(quick_gelu=True), r"visual\.activation is 'GELU'.*text\.activation.*'QuickGELU'"),
    "bottleneck": (lambda: trained(bottleneck=64), r"adapters\.bottleneck is 32 in the file and 64 here"),
    "share": (lambda: trained(share=None), r"adapters\.share is 'both' in the file and None here"),
    "towers": (lambda: trained(towers=("text",)), r"adapters\.towers is .*'visual', 'text'.* and \('text',\) here"),
    "padding": (lambda: trained(skip_padding=True), r"adapters\.skip_padding is False in the file and True here"),
    "scale": (lambda: tiny_clip(nonscalar_logit_scale=True), r"logit_scale must have shape \(1,\), got \(\)"),
}


@pytest.mark.parametrize(("make", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_the_wrong_model_is_refused(tmp_path, make, message):
    save_adapters(trained(), tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert_unchanged(model, before)


def test_a_tower_that_cannot_be_served_is_refused(tmp_path):
    save_adapters(trained(), tmp_path)
    model = tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32})
    with pytest.raises(NotImplementedError, match="ModifiedResNet"):
        load_adapters(model, tmp_path)


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapters.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapters.safetensors")


def edit_config(folder, change):
    config = json.loads((folder / "adapters.json").read_text())
    change(config)
    (folder / "adapters.json").write_text(json.dumps(config))


def cut(folder):
    path = folder / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "nan": (
        lambda f: edit_tensors(f, lambda t: t["text.1.up.bias"].fill_(float("nan"))),
        r"text\.1\.up\.bias is not fin",
    ),
    "inf": (
        lambda f: edit_tensors(f, lambda t: t["visual.0.gate"].fill_(float("inf"))),
        r"visual\.0\.gate is not finite",
    ),
    "complex": (
        lambda f: edit_tensors(f, lambda t: t.update({"visual.0.gate": torch.tensor(1j)})),
        r"visual\.0\.gate must be floating point, got torch\.complex64",
    ),
    "float8": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"visual.0.gate": torch.tensor(torch.nan).to(torch.float8_e4m3fn)})
        ),
        r"visual\.0\.gate is not finite",
    ),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop("visual.1.gate")), r"visual\.1\.gate is missing"),
    "unknown": (lambda f: edit_tensors(f, lambda t: t.update(more=torch.ones(1))), "more is unknown"),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"text.0.down.bias": torch.ones(31)})),
        r"text\.0\.down\.bias must have shape \(32,\), got \(31,\)",
    ),
    "cut": (cut, r"adapters\.safetensors is not a whole safetensors file"),
    "no_json": (lambda f: (f / "adapters.json").write_text("{"), r"adapters\.json is not JSON"),
    "list": (lambda f: (f / "adapters.json").write_text("[]"), "format 1, got 'list'"),
    "format": (lambda f: edit_config(f, lambda c: c.update(format=2)), "format 1, got 2"),
    "lacking": (lambda f: edit_config(f, lambda c: c["adapters"].pop("share")), r"json lacks adapters\.share"),
    "no_model": (lambda f: edit_config(f, lambda c: c.pop("model")), "json lacks model"),
    "towers": (
        lambda f: edit_config(f, lambda c: c["adapters"].update(towers=3)),
        r"json: adapters\.towers must be.*got 3",
    ),
    "bottleneck": (
        lambda f: edit_config(f, lambda c: c["adapters"].update(bottleneck="a")),
        "adapters.*bottleneck.*'a'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("make", [tiny_clip, trained])
def test_damage_is_named_and_nothing_changes(tmp_path, make, damage, message):
    save_adapters(trained(), tmp_path)
    damage(tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["adapters.json", "adapters.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    save_adapters(trained(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapters(tiny_clip(), tmp_path)
