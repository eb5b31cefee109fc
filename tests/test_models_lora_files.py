"""LoRA files and models that do not go together are refused, by name, before anything changes."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsfast.models import load_lora, lora_layers, merge_lora, save_lora
from tests.test_models_lora_storage import CONFIG, WEIGHTS, clip, net, stirred, with_lora
from tests.tiny_clip import assert_unchanged, snapshot
from tests.tiny_peft import LINEAR


@pytest.fixture
def saved(tmp_path):
    save_lora(with_lora(clip, targets=("q", "out", "fc")), tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder, *, tensors=None, drop=(), **config):
    """Another value for options of the config, and for tensors by the end of their names."""
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**old, **config}))
    found = {name: t for name, t in load_file(folder / WEIGHTS).items() if not name.endswith(tuple(drop))}
    for end, value in (tensors or {}).items():
        names = [name for name in found if name.endswith(end)] or [end]
        found |= {name: value(found.get(name)) for name in names[:1]}
    save_file({name: t.contiguous() for name, t in found.items()}, folder / WEIGHTS)


B = "transformer.resblocks.0.mlp.c_fc.lora_B.weight"
BAD = [
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
    ({"use_dora": True}, "not plain LoRA: use_dora is True"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"modules_to_save": ["head"]}, r"modules_to_save is \['head'\]"),
    ({"target_parameters": ["a.b"]}, "target_parameters is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"option_of_tomorrow": 3}, "option_of_tomorrow is 3"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"r": 0}, "r, rank_pattern must be positive integers"),
    ({"r": 4, "rank_pattern": {}}, "must have shape"),
    ({"lora_alpha": "8"}, "lora_alpha, alpha_pattern must be finite numbers"),
    ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
    ({"rank_pattern": [3]}, "rank_pattern and alpha_pattern must be dicts"),
    ({"lora_alpha": float("nan")}, "lora_alpha, alpha_pattern must be finite numbers"),
    ({"rank_pattern": {"(": 3}}, "is no regular expression"),
    ({"tensors": {B: lambda t: t * torch.nan}}, f"{B} is not finite"),
    ({"tensors": {B: lambda t: t[:-1]}}, f"{B} must have shape"),
    ({"tensors": {B: lambda t: t.int()}}, f"{B} must be floating point"),
    ({"drop": [B]}, f"{B} is missing"),
    ({"tensors": {"base_model.model.ln_final.lora_A.weight": lambda _: torch.ones(3, 3)}}, "ln_final cannot have LoRA"),
    ({"tensors": {"base_model.model.transformer.x.lora_A.weight": lambda _: torch.ones(3, 3)}}, "no such layer"),
    ({"tensors": {"base_model.model.visual.conv1.lora_A.weight": lambda _: torch.ones(3, 3)}}, "it is a Conv2d"),
    ({"tensors": {"base_model.model.a.lora_magnitude_vector": lambda _: torch.ones(3)}}, "no factor of a plain LoRA"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("with_its_own", [False, True], ids=["without LoRA", "with LoRA"])
def test_bad_files_are_refused_and_change_nothing(saved, change, message, with_its_own):
    edit(saved, **change)
    model = with_lora(clip, targets=("q", "out", "fc")) if with_its_own else clip()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as refused:
        load_lora(model, saved)
    assert str(saved) in str(refused.value)
    assert_unchanged(model, before)


def test_files_that_are_missing_or_damaged(saved):
    model = clip()
    for name, message in ((CONFIG, "not JSON"), (WEIGHTS, "not a whole safetensors file")):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=message):
            load_lora(model, saved)
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            load_lora(model, saved)
        (saved / name).write_bytes(whole)
    load_lora(model, saved)


def test_bad_models(saved, tmp_path):
    with pytest.raises(ValueError, match="no LoRA; add_lora"):
        save_lora(clip(), tmp_path / "never")
    with pytest.raises(ValueError, match="adapter must be None"):
        save_lora(with_lora(clip), tmp_path / "never", adapter=0)
    with pytest.raises(ValueError, match="adapter is for a model of several"):
        load_lora(clip(), saved, adapter=0)
    for options, message in (
        ({"r": 2}, "must be of rank 2"),
        ({"targets": ("q", "v", "out", "fc")}, "in each of the slices"),
        ({"targets": ("q", "fc")}, "out_proj cannot have LoRA"),
        ({"targets": ("q", "out", "fc", "proj")}, "c_proj is missing"),
    ):
        model = with_lora(clip, **{"targets": ("q", "out", "fc"), **options})
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_lora(model, saved)
        assert_unchanged(model, before)
    model = with_lora(clip, targets=("q", "out", "fc"))
    merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="is merged; unmerge_lora"):
        load_lora(model, saved)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="no such layer"):
        load_lora(net(), saved)
    tied = net()
    tied.v.weight = tied.q.weight
    save_lora(with_lora(net, targets=LINEAR), tmp_path / "net")
    with pytest.raises(ValueError, match="tied"):
        load_lora(tied, tmp_path / "net")
    assert not lora_layers(tied)


@pytest.mark.parametrize("stored", [[[0, 24], [0, 24]], [[0, 24], [20, 30]], [[48, 72], [0, 24]], [[0, 80]], [[5, 5]]])
def test_slices_that_cannot_be_are_not_taken_from_the_file(saved, stored):
    name = "transformer.resblocks.0.attn"
    header = {"rsfast.slices": json.dumps({name: stored})}
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, header)
    model = clip()
    assert load_lora(model, saved).placed[f"{name}.in_proj"] == ((0, 24),)  # by its zeros
    header = {"rsfast.slices": json.dumps({name: [["a", 3]]})}
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, header)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_lora(clip(), saved)


def test_wrapped_models_are_refused(saved):
    model = with_lora(clip)
    for wrapped in (torch.compile(model, backend="eager"), "model"):
        with pytest.raises(TypeError, match="model must"):
            save_lora(wrapped, saved / "never")
        with pytest.raises(TypeError, match="model must"):
            load_lora(wrapped, saved)
    assert not (saved / "never").exists()


def test_a_crash_leaves_the_old_files(saved, monkeypatch):
    before = {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    model = stirred(with_lora(clip, targets=("q", "out", "fc")), seed=6)

    def crash(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="full"):
        save_lora(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_names_that_mean_one_layer_are_refused(saved):
    name = "base_model.model.transformer.resblocks.0.attn.lora_A.weight"
    tensors = load_file(saved / WEIGHTS)
    for letter in "AB":
        own = name.replace("attn.lora_A", f"attn.in_proj.lora_{letter}")
        tensors[own] = tensors[name.replace("lora_A", f"lora_{letter}")].clone()
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ValueError, match="two of its names mean one layer"):
        load_lora(clip(), saved)


def test_without_peft(saved, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    model = clip()
    load_lora(model, saved)
    save_lora(model, saved)
