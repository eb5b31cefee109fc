"""LoRA in PEFT's files: what PEFT saved loads here, and what was saved here loads in PEFT."""

import json
import os
import sys
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.layer import MultiheadAttention
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import rsfast
from rsfast.models import add_lora, load_lora, lora_layers, merge_lora, patch_peft, save_lora, set_adapter_ids
from tests.test_models_peft_attention import ATTN, features, merged_by_hand
from tests.tiny_clip import CUSTOM, assert_unchanged, inputs, snapshot, tiny_clip, tiny_custom_text_clip
from tests.tiny_peft import LINEAR, Net, example, make

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
TEXTS = inputs()[1][:2]


def net():
    torch.manual_seed(0)
    return Net().double().eval()


def timm_vit():
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4)
    return VisionTransformer(**sizes).double().eval()


def hf_clip():
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    return CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **sizes)).double().eval()


def clip(**options):
    return tiny_clip(**options).double()


def output(model):
    """What a model computes, of whatever kind it is."""
    kind = type(model.base_model.model if isinstance(model, peft.PeftModel) else model)
    with torch.no_grad():
        if kind is Net:
            return model(example())
        if kind is CLIPVisionModel:
            return model(pixel_values=IMAGES).pooler_output
        return features(model)(IMAGES, TEXTS) if hasattr(model, "encode_text") else model(IMAGES)


def stirred(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.copy_(0.4 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
            if isinstance(layer, rsfast.BatchedLoRALinear):
                for A, B, rank in zip(layer.lora_A, layer.lora_B, layer.ranks, strict=True):
                    A.view(-1, layer.r, layer.in_features)[:, rank:] = 0
                    B[:, rank:] = 0
    return model


def with_lora(make_model, **options):
    model = make_model()
    add_lora(model, **{"r": 3, "alpha": 5, **options})
    return stirred(model)


def in_peft(model, folder):
    """PEFT's model of a folder; what it says of the files is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers
        return peft.PeftModel.from_pretrained(model, folder)


def mended(theirs):
    """PEFT's own attention counts out_proj twice."""
    if any(isinstance(module, MultiheadAttention) for module in theirs.modules()):
        patch_peft(theirs)
    return theirs


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)  # fp64; sums in another order


def assert_same_lora(a, b):
    a, b = lora_layers(a), lora_layers(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].slices == b[path].slices and a[path].scaling == b[path].scaling, path
        for name in ("lora_A", "lora_B"):
            assert torch.equal(getattr(a[path], name), getattr(b[path], name)), f"{path}.{name}"
            assert getattr(b[path], name).requires_grad


EVERYTHING = ("q", "k", "v", "out", "fc", "proj")
KINDS = [
    pytest.param(net, {"targets": LINEAR}, id="linear layers"),
    pytest.param(hf_clip, {"targets": EVERYTHING}, id="Hugging Face"),
    pytest.param(timm_vit, {"targets": EVERYTHING}, id="timm"),
    pytest.param(timm_vit, {"targets": ("q", "v")}, id="timm's q and v"),
    pytest.param(timm_vit, {"targets": ("qkv", "proj", "head")}, id="timm's qkv as one"),
    pytest.param(clip, {"targets": EVERYTHING}, id="open_clip"),
    pytest.param(clip, {"targets": ("k",)}, id="open_clip's k"),
    pytest.param(clip, {"targets": ("out", "fc")}, id="open_clip without q, k, v"),
    pytest.param(lambda: tiny_custom_text_clip().double(), {"targets": ("q", "v", "out")}, id="CustomTextCLIP"),
]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fresh"])
@pytest.mark.parametrize("make_model, options", KINDS)
def test_saved_here(tmp_path, make_model, options, trained):
    """Loads into PEFT with the same outputs, and back here as it was, bit for bit."""
    model = with_lora(make_model, dropout=0.25, **options)
    if not trained:
        for layer in lora_layers(model).values():
            layer.reset_lora()
    save_lora(model, tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [CONFIG, WEIGHTS]
    theirs = mended(in_peft(make_model(), tmp_path / "new" / "folder"))
    assert_close(output(theirs), output(model))

    fresh = make_model()
    report = load_lora(fresh, tmp_path / "new" / "folder")
    assert_same_lora(model, fresh)
    assert torch.equal(output(fresh), output(model))
    assert list(report.placed) == [path for path in report.placed if path in lora_layers(model)]
    trainable = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(layer.dropout == 0.25 for layer in lora_layers(fresh).values())

    again = make_model()
    add_lora(again, r=3, alpha=1, **options)
    load_lora(again, tmp_path / "new" / "folder")
    assert_same_lora(model, again)


PATTERNS = dict(rank_pattern={"v": 5, "^blocks.1.attn.qkv": 2}, alpha_pattern={"fc": 1, "fc1": 3}, use_rslora=True)


@pytest.mark.parametrize(
    "make_model, config",
    [
        pytest.param(net, {"target_modules": list(LINEAR), **PATTERNS}, id="linear layers"),
        pytest.param(net, {"target_modules": r"q|v", "lora_dropout": 0.3, "lora_alpha": 20}, id="expression"),
        pytest.param(hf_clip, {"target_modules": ["q_proj", "v_proj", "fc1"]}, id="Hugging Face"),
        pytest.param(timm_vit, {"target_modules": ["qkv", "attn.proj", "fc1", "head"], **PATTERNS}, id="timm"),
        pytest.param(timm_vit, {"target_modules": "all-linear", "init_lora_weights": "gaussian"}, id="all-linear"),
    ],
)
def test_saved_by_peft(tmp_path, make_model, config):
    theirs = make(config, module=make_model())
    theirs.save_pretrained(tmp_path)
    model = make_model()
    report = load_lora(model, tmp_path / "one")
    assert_close(output(model), output(theirs))
    assert not report.skipped and set(report.placed.values()) == {None}  # one LoRA for all of a fused projection
    save_lora(model, tmp_path / "ours")
    assert_close(output(in_peft(make_model(), tmp_path / "ours")), output(theirs))


def test_saved_by_peft_on_open_clip(tmp_path):
    theirs = make({**ATTN, "target_modules": ["attn", "c_fc"], "rank_pattern": {"^transformer.resblocks.0.attn": 5}},
                  module=tiny_clip())  # fmt: skip
    theirs.save_pretrained(tmp_path)
    model = clip()
    report = load_lora(model, tmp_path / "one")
    assert_close(output(model), features(merged_by_hand(theirs))(IMAGES, TEXTS))
    assert report.placed["transformer.resblocks.0.attn.in_proj"] is None and len(report.placed) == 15
    ranks = {path: layer.r for path, layer in lora_layers(model).items()}
    assert ranks["transformer.resblocks.0.attn.out_proj"] == 5 and ranks["transformer.resblocks.1.attn.in_proj"] == 3
    save_lora(model, tmp_path / "ours")
    back = in_peft(clip(), tmp_path / "ours")
    assert_close(output(back), output(theirs))  # PEFT's own attention, twice out_proj in both


def test_untouched_blocks_come_back_as_slices_from_a_file_of_peft(tmp_path):
    """PEFT drops the header that names the slices; then the zeros say it."""
    model = with_lora(clip, targets=("q", "v", "out"))
    save_lora(model, tmp_path / "ours")
    in_peft(clip(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    fresh = clip()
    load_lora(fresh, tmp_path / "theirs")
    assert_same_lora(model, fresh)


def test_blocks_that_were_trained_further_are_one_lora(tmp_path):
    model = with_lora(timm_vit, targets=("q", "v"))
    save_lora(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.blocks.1.attn.qkv.lora_B.weight"
    assert tensors[name].shape == (72, 6) and not tensors[name][:24, 3:].any() and not tensors[name][24:48].any()
    tensors[name][30, 5] = 0.1  # a row of k
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        save_file(tensors, tmp_path / WEIGHTS, file.metadata())
    fresh = timm_vit()
    report = load_lora(fresh, tmp_path)
    assert report.placed == {"blocks.0.attn.qkv": ((0, 24), (48, 72)), "blocks.1.attn.qkv": None}
    assert_close(output(fresh), output(in_peft(timm_vit(), tmp_path)))
    with pytest.raises(ValueError, match="blocks.1.attn.qkv must be of rank 3 in each of the slices"):
        load_lora(model, tmp_path)


def test_one_tower_whose_names_end_those_of_the_other(tmp_path):
    model = clip()
    add_lora(model.transformer, r=2, targets=("q", "out", "fc"))
    stirred(model)
    save_lora(model, tmp_path)
    theirs = in_peft(clip(), tmp_path)
    assert not any("visual" in name for name, _ in theirs.named_parameters() if "lora_" in name)
    patch_peft(theirs)
    assert_close(output(theirs), output(model))
    fresh = clip()
    assert not any("visual" in path for path in load_lora(fresh, tmp_path).placed)
    assert torch.equal(output(fresh), output(model))


def test_where_peft_has_no_lora_a_warning_names_it(tmp_path):
    def make_model():
        return clip(text=CUSTOM)

    model = with_lora(make_model, targets=("q", "out"))
    with pytest.warns(UserWarning, match="PEFT has no LoRA for transformer.resblocks.0.attn.in_proj, "):
        save_lora(model, tmp_path)
    fresh = make_model()
    load_lora(fresh, tmp_path)
    assert_same_lora(model, fresh)
    assert torch.equal(output(fresh), output(model))
    alone = nn.MultiheadAttention(8, 2)
    add_lora(alone, r=2)
    with pytest.warns(UserWarning, match="in_proj"):
        save_lora(alone, tmp_path)
    load_lora(nn.MultiheadAttention(8, 2), tmp_path)


def test_half_precision(tmp_path):
    """fp32 factors beside a bf16 model stay fp32, in the file and back; a bf16 file becomes fp32."""
    model = with_lora(lambda: clip().bfloat16())
    save_lora(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    fresh = clip().bfloat16()
    load_lora(fresh, tmp_path)
    assert_same_lora(model, fresh)
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    fresh = clip().bfloat16()
    load_lora(fresh, tmp_path)
    assert all(layer.lora_A.dtype == torch.float32 for layer in lora_layers(fresh).values())


@pytest.mark.parametrize("make_model", [timm_vit, clip])
def test_several_adapters(tmp_path, make_model):
    """A folder for each; any of them into any place of another bank, or alone into a model."""
    bank = with_lora(make_model, num_adapters=3, targets=("q", "v", "out", "fc"))
    for layer in lora_layers(bank).values():
        layer.ranks = (3, 1, 2)
        layer.scaling.copy_(torch.tensor([1.0, 0.5, 2.0]))
    stirred(bank)
    other = with_lora(make_model, num_adapters=2, targets=("q", "v", "out", "fc"), r=4)
    for g in range(3):
        save_lora(bank, tmp_path / str(g), adapter=g)
        alone = make_model()
        load_lora(alone, tmp_path / str(g))
        assert {layer.r for layer in lora_layers(alone).values()} == {(3, 1, 2)[g]}
        load_lora(other, tmp_path / str(g), adapter=1)
        assert all(layer.ranks == (4, (3, 1, 2)[g]) for layer in lora_layers(other).values())
        set_adapter_ids(bank, torch.tensor([g, g]))
        set_adapter_ids(other, torch.tensor([1, 1]))
        assert_close(output(alone), output(bank))
        assert_close(output(other), output(bank))
        theirs = mended(in_peft(make_model(), tmp_path / str(g)))
        assert_close(output(theirs), output(bank))
    before = snapshot(other)
    save_lora(with_lora(make_model, targets=("q", "v", "out", "fc"), r=5), tmp_path / "high")
    for adapter, message in ((1, "rank at most 4"), (2, "adapter must be 0 to 1"), (None, "adapter must be 0 to 1")):
        with pytest.raises(ValueError, match=message):
            load_lora(other, tmp_path / "high", adapter=adapter)
    for adapter in (None, 3, -1, True):
        with pytest.raises(ValueError, match="adapter must be 0 to 2"):
            save_lora(bank, tmp_path / "never", adapter=adapter)
    assert not (tmp_path / "never").exists()
    assert_unchanged(other, before)


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
