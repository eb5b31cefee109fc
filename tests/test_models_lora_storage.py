"""LoRA in PEFT's files: what PEFT saved loads here, and what was saved here loads in PEFT."""

import os
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
from rsfast.models import add_lora, load_lora, lora_layers, patch_peft, remove_lora, save_lora, set_adapter_ids
from tests.lora_models import MODELS, build, run
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
    trainable = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(layer.dropout == 0.25 for layer in lora_layers(fresh).values())

    again = make_model()
    assert list(report.placed.items()) == list(add_lora(again, r=3, alpha=1, **options).placed.items())
    load_lora(again, tmp_path / "new" / "folder")
    assert_same_lora(model, again)


NOT_IN_PEFT = ("custom_blocks", "coca", "main", "main_cosine", "eva", "beit", "swin", "swin_2")


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(tmp_path, name):
    """Back here as it was; and in PEFT, but where that has no LoRA for an attention, or one that is never called."""
    model, batch = build(name)
    add_lora(model, r=2, alpha=3, targets=("q", "v", "out", "fc", "proj"))
    stirred(model)
    with warnings.catch_warnings(record=True) as warned:
        save_lora(model, tmp_path)
    assert [w.category for w in warned] == [UserWarning] * (name in NOT_IN_PEFT)
    fresh, _ = build(name)
    before = snapshot(fresh)
    load_lora(fresh, tmp_path)
    assert_same_lora(model, fresh)
    assert torch.equal(run(fresh, batch), run(model, batch))
    remove_lora(fresh)
    assert_unchanged(fresh, before)
    if name not in NOT_IN_PEFT:
        theirs = mended(in_peft(build(name)[0], tmp_path)).base_model.model
        assert_close(run(theirs, batch), run(model, batch))


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
    with pytest.warns(UserWarning, match="PEFT has no LoRA that takes part for transformer.resblocks.0.attn.in_proj, "):
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


def test_projections_of_other_scalings_and_ranks(tmp_path):
    """PEFT has one of each for an attention; what it computes is the same."""
    model = with_lora(clip, targets=("q", "v", "out"))
    for path, layer in lora_layers(model).items():
        layer.scaling = 2.0 if path.endswith("out_proj") else 0.5
    save_lora(model, tmp_path)
    assert_close(output(mended(in_peft(clip(), tmp_path))), output(model))
    fresh = clip()
    load_lora(fresh, tmp_path)
    assert_close(output(fresh), output(model))
    assert {layer.r for layer in lora_layers(fresh).values()} == {3}


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
