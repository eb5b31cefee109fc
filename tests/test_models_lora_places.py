"""Where LoRA goes and where it does not: targets, refusals, reports, gated adapters beside it."""

import copy
import itertools

import pytest
import torch
from open_clip.model import CLIP
from timm.models.maxxvit import AttentionCl
from torch import nn

import rsfast
from rsfast import BatchedLoRALinear, LoRALinear
from rsfast.models import (
    LoraReport,
    adapters_off,
    add_adapters,
    add_lora,
    lora_layers,
    merge_lora,
    remove_adapters,
    remove_lora,
    set_adapter_ids,
    unmerge_lora,
)
from tests.lora_models import MODELS, build, run, stir_lora
from tests.tiny_clip import SIZE, assert_unchanged, features, inputs, snapshot, stir, tiny_clip, tiny_custom_text_clip


def places(name, *targets, **options):
    return add_lora(build(name)[0], 2, targets=targets, **options).placed


def test_aliases_mean_the_same_everywhere():
    block = "visual.transformer.resblocks.0"
    D = 32
    clip = places("clip", "v", "q", "out", "proj")
    assert clip[f"{block}.attn.in_proj"] == ((0, D), (2 * D, 3 * D)) and f"{block}.mlp.c_fc" not in clip
    assert clip[f"{block}.attn.out_proj"] is clip[f"{block}.mlp.c_proj"] is None
    assert len(clip) == 15
    assert places("timm", "k", "out", "fc") == {
        f"blocks.{j}.{name}": slices
        for j in range(2)
        for name, slices in (("attn.qkv", ((16, 32),)), ("attn.proj", None), ("mlp.fc1", None))
    }
    assert places("eva", "q", "k", "v") == {"blocks.0.attn.qkv": ((0, 16), (16, 32), (32, 48))}
    assert list(places("eva_separate", "v", "q", "fc")) == [
        f"blocks.0.{name}" for name in ("attn.q_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x")
    ]
    pool = {f"visual.trunk.attn_pool.{name}": slices for name, slices in (("q", None), ("kv", ((0, 16), (16, 32))))}
    assert pool.items() <= places("timm_in_open_clip", "q", "k", "v").items()
    for name, block in (("swin", "features.3.0"), ("swin_2", "features.3.0")):
        found = places(name, "q", "v", "out", "fc", "proj")
        assert len(found) == 12 and found[f"{block}.attn.qkv"] == ((0, 32), (64, 96)), name
        assert [path for path in found if path.startswith(block)] == [
            f"{block}.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.3")
        ]
    layer = "encoder.layers.encoder_layer_0"
    assert places("torchvision_vit", "k", "proj") == {
        f"{layer}.self_attention.in_proj": ((16, 32),),
        f"{layer}.mlp.3": None,
    }
    towers = [f"{tower}_model.encoder.layers.0" for tower in ("text", "vision")]
    assert places("hf_clip", "v", "proj") == dict.fromkeys(
        [f"{tower}.{name}" for tower in towers for name in ("self_attn.v_proj", "mlp.fc2")]
    )
    assert places("hf_siglip", "k")["head.attention.in_proj"] == ((16, 32),)
    assert places("coca", "k").keys() >= {"visual.attn_pool.attn.k_proj", "text_decoder.cross_attn.0.attn.in_proj"}
    assert places("main", "q")["pool.q_proj"] is None


def test_names_are_whole_paths_or_their_ends():
    path = "visual.transformer.resblocks.1"
    assert list(places("clip", f"{path}.mlp.c_fc")) == [f"{path}.mlp.c_fc"]
    assert len(places("clip", "c_fc")) == len(places("clip", "mlp.c_fc")) == 5
    assert list(places("timm", "head")) == ["head"]
    with pytest.raises(ValueError, match="'ead' names no linear layer"):
        places("timm", "ead")
    whole = places("clip", f"{path}.attn.in_proj", "1.attn.out_proj")
    assert whole == {
        f"{path}.attn.in_proj": None,
        f"{path}.attn.out_proj": None,
        "transformer.resblocks.1.attn.out_proj": None,
    }
    assert places("timm", "qkv")["blocks.0.attn.qkv"] is None
    assert places("clip", "fc", "c_fc", "mlp.c_fc") == places("clip", "fc")
    assert add_lora(nn.ModuleDict({"fc": nn.Linear(8, 3)}), r=2).placed == {"fc": None}  # as a ResNet calls its last
    heads_first = AttentionCl(8, dim_head=4)  # q, k and v of a head lie together; all of them may have one LoRA
    assert add_lora(heads_first, r=2, targets=("qkv",)).placed == {"qkv": None}
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    report = add_lora(model, 2, 4, ("2",))
    assert report == LoraReport({"2": None}, {}, 2 * 4 + 3 * 2) and model[2].scaling == 2


def test_report_reads():
    text = str(add_lora(tiny_clip(), r=2, targets=("q", "out")))
    assert text.splitlines() == ["LoRA in 10 layers: 5 in_proj, 5 out_proj", "trainable parameters: 1,152"]
    report = add_lora(nn.MultiheadAttention(8, 2), r=2)
    assert report.skipped == dict.fromkeys(("fc", "proj"), "the model has no such layer")
    assert "skipped fc: the model has no such layer" in str(report)


BAD = {
    "r must be a positive integer, got 0": {"r": 0},
    "r must be a positive integer, got 2.0": {"r": 2.0},
    "r must be at most 32 for visual.transformer.resblocks.0.attn.in_proj": {"r": 33, "targets": ("q",)},
    "r must be at most 24 for transformer.resblocks.0.attn.in_proj, whose LoRA has 24": {"r": 25},
    "alpha must be a positive number, got nan": {"alpha": float("nan")},
    "alpha must be a positive number, got True": {"alpha": True},
    "dropout must be a number of at least 0 and below 1, got 1": {"dropout": 1},
    "num_adapters must be a positive integer, got 0": {"num_adapters": 0},
    "freeze must be True or False, got 1": {"freeze": 1},
    "impl must be": {"impl": "fast"},
    "targets must be names in a tuple or list, one or more, got 'q'": {"targets": "q"},
    r"targets must be names in a tuple or list, one or more, got \(\)": {"targets": ()},
    r"targets must be names in a tuple or list, one or more, got \(1,\)": {"targets": (1,)},
    "targets: 'attn' names no linear layer of the model; there are q, k, v, out, fc, proj, and by name in_proj": {
        "targets": ("q", "attn")
    },
    "targets: 'conv1' names no linear layer": {"targets": ("conv1",)},
    "targets mean all of visual.transformer.resblocks.0.attn.in_proj and parts of it": {"targets": ("q", "in_proj")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named_before_anything_changes(message):
    model = tiny_clip()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **BAD[message])
    assert_unchanged(model, before)


def test_a_second_lora_and_what_is_missing_are_refused():
    model = tiny_clip()
    for call in (remove_lora, merge_lora, unmerge_lora, lambda m: set_adapter_ids(m, torch.tensor([0]))):
        with pytest.raises(ValueError, match="LoRA"):
            call(model)
    add_lora(model, r=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has LoRA already, in visual.transformer.resblocks.0.attn.out_proj"):
        add_lora(model, r=2, targets=("fc",))
    with pytest.raises(ValueError, match="no LoRA of several adapters"):
        set_adapter_ids(model, torch.tensor([0]))
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
        add_lora({})
    with pytest.raises(ValueError, match="model is itself a linear layer"):
        add_lora(nn.Linear(4, 4))
    by_hand = nn.Sequential(LoRALinear(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="has LoRA already, in 0"):
        add_lora(by_hand, targets=("1",))
    with pytest.raises(ValueError, match="add_lora has put no LoRA"):
        remove_lora(by_hand)


def test_several_adapters_bad_input():
    model = tiny_clip()
    add_lora(model, r=2, num_adapters=2)
    before = snapshot(model)
    for call in (merge_lora, unmerge_lora):
        with pytest.raises(ValueError, match="in_proj has 2 adapters|out_proj has 2 adapters"):
            call(model)
    with pytest.raises(ValueError, match="adapter_ids must be -1 .* to 1"):
        set_adapter_ids(model, torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="a batch for 3 adapters, but there are 2"):
        set_adapter_ids(model, rsfast.AdapterBatch(torch.tensor([0, 2, 1]), 3))
    assert_unchanged(model, before)
    set_adapter_ids(model, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="adapter_ids must be"):
        model(*inputs())  # three samples
    set_adapter_ids(model.visual, torch.tensor([0, 1, -1]))
    model.encode_image(inputs()[0])
    batches = {id(layer.adapter_ids) for layer in lora_layers(model.visual).values()}
    assert len(batches) == 1  # one, so that what kernels derive from it is derived once
    set_adapter_ids(model, None)
    with pytest.raises(ValueError, match="adapter_ids must be given"):
        model(*inputs())


def test_a_merge_that_is_not_finite_changes_nothing():
    model, batch = build("clip")
    add_lora(model, r=2)
    stir_lora(model)
    with torch.no_grad():
        list(lora_layers(model).values())[7].lora_B[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        merge_lora(model)
    assert torch.equal(
        torch.cat([v.flatten() for v in model.state_dict().values()]),
        torch.cat([v.flatten() for v in before[0].values()]),
    )
    assert not any(layer.merged for layer in lora_layers(model).values())


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x.round())


def odd_model():
    """Layers that cannot have LoRA, each for another reason, and one that can."""
    model = nn.ModuleDict()
    model["fine"] = nn.Linear(8, 8)
    model["own_product"] = Quantised(8, 8)
    model["parametrised"] = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model["hooked"] = nn.Linear(8, 8)
    model["hooked"].register_forward_hook(lambda *args: None)
    model["replaced"] = nn.Linear(8, 8)
    model["replaced"].forward = lambda x: x
    model["integers"] = nn.Linear(8, 8)
    model["integers"].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model["encoder"] = nn.TransformerEncoderLayer(8, 2, 16)
    model["more_keys"] = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    model["heads_first"] = AttentionCl(8, dim_head=4)
    model["no_attention"] = nn.ModuleDict({"proj": nn.Linear(8, 8), "fc1": nn.Linear(8, 8)})
    return model


def test_what_cannot_have_lora_is_skipped_with_the_reason():
    model = odd_model()
    before = snapshot(model)
    names = [name for name in model if name not in ("encoder", "more_keys", "heads_first", "no_attention")]
    report = add_lora(model, r=2, targets=(*names, "linear1", "q", "out"))
    assert report.placed == {"fine": None, "heads_first.proj": None}
    reasons = {
        "own_product": "Quantised computes its product",
        "parametrised": "parametrised",
        "hooked": "hooks",
        "replaced": "forward is replaced",
        "integers": "torch.int8",
        "encoder.linear1": "without calling",
        "encoder.self_attn.in_proj": "without calling",
        "encoder.self_attn.out_proj": "without calling",
        "more_keys.in_proj": "add_bias_kv",
        "more_keys.out_proj": "add_bias_kv",
        "heads_first.qkv": "AttentionCl does not keep q, k, v one after the other",
    }
    assert report.skipped.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert reason in report.skipped[path], path
    remove_lora(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"match nothing that can have LoRA \(hooked: it has hooks"):
        add_lora(model, r=2, targets=("hooked",))
    assert_unchanged(model, before)


def test_a_resnet_tower_is_left_alone():
    vision = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 32}
    model = CLIP(8, vision, {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50, "context_length": 7})
    report = add_lora(model, r=2)
    assert all(path.startswith("transformer.") for path in report.placed)
    assert report.skipped.keys() == {f"visual.attnpool.{name}_proj" for name in "qkv"}
    assert all("AttentionPool2d reads the weights" in why for why in report.skipped.values())


def test_tied_weights_are_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False), "a": nn.Linear(8, 8)})
    model["head"].weight = model["embed"].weight
    model["b"] = model["a"]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head cannot have LoRA, its weight is tied: embed.weight and head.weight"):
        add_lora(model, r=2, targets=("head",))
    with pytest.raises(ValueError, match="a.weight and b.weight are one"):
        add_lora(model, r=2, targets=("a",))
    assert_unchanged(model, before)


def test_an_error_while_building_leaves_the_model(monkeypatch):
    model = tiny_clip()
    before = snapshot(model)
    left = [7]

    def fail(self):
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        nn.init.zeros_(self.lora_B)

    monkeypatch.setattr(LoRALinear, "reset_lora", fail)
    with pytest.raises(MemoryError):
        add_lora(model, r=2)
    assert_unchanged(model, before)


@pytest.mark.parametrize("freeze", [True, False])
def test_freezing(freeze):
    model = tiny_clip()
    model.token_embedding.requires_grad_(False)
    report = add_lora(model, r=2, targets=("q", "fc"), freeze=freeze)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" in name} == {name for name in model.state_dict() if "lora" in name}
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        freeze == (trained == {name for name in trained if "lora" in name}) and "token_embedding.weight" not in trained
    )
    assert not any(
        name.endswith(("attn.in_proj_weight", "in_proj_bias", "c_fc.weight", "c_fc.bias")) for name in trained
    )


def test_layers_of_gated_adapters_are_none_to_it():
    """An adapter reads its layers' weights and does not call them."""
    model = tiny_clip()
    add_adapters(model, **SIZE)
    with pytest.raises(ValueError, match="'down' names no linear layer"):
        add_lora(model, r=2, targets=("down",))


@pytest.mark.parametrize("first, leaves", list(itertools.product(("adapters", "lora"), repeat=2)))
def test_beside_gated_adapters_in_any_order(first, leaves):
    add = {
        "adapters": lambda f: add_adapters(model, **SIZE, freeze=f),
        "lora": lambda f: add_lora(model, r=2, freeze=f),
    }
    remove = {"adapters": remove_adapters, "lora": remove_lora}
    second, stays = ({"adapters", "lora"} - {name} for name in (first, leaves))
    (second,), (stays,) = second, stays
    model = tiny_custom_text_clip()
    model.lock_image_tower(unlocked_groups=1)
    before = snapshot(model)
    add[first](True)
    add[second](False)
    kinds = {
        "adapters": lambda name: ".adapter." in name or name == "logit_scale",
        "lora": lambda name: "lora_" in name,
    }
    for name, parameter in model.named_parameters():
        trained = kinds["adapters"](name) or kinds["lora"](name)
        if name == "logit_scale":  # LoRA freezes it, and does not train it
            trained = first == "adapters"
        assert parameter.requires_grad == trained, name
    a = features(stir(stir_lora(model)), *inputs())
    twin = copy.deepcopy(model)
    if leaves == "adapters":
        with adapters_off(twin):
            off = features(twin, *inputs())
    remove[leaves](model)
    for name, parameter in model.named_parameters():
        assert kinds[stays](name) == parameter.requires_grad or name == "logit_scale", name
    b = features(model, *inputs())
    assert not torch.allclose(a[0], b[0], atol=1e-3) and not torch.allclose(a[1], b[1], atol=1e-3)
    if leaves == "adapters":
        assert torch.equal(off[0], b[0])
    remove[stays](model)
    assert_unchanged(model, before)


def test_layers_are_what_they_say():
    for name in MODELS:
        if name == "lnd":
            continue
        model, batch = build(name)
        add_lora(model, r=2, num_adapters=2)
        assert all(
            isinstance(layer, BatchedLoRALinear) and layer.num_adapters == 2 for layer in lora_layers(model).values()
        )
        set_adapter_ids(model, torch.tensor([-1, -1, -1]))
        assert run(model, batch).isfinite().all()
        remove_lora(model)
        add_lora(model, 2, 6, dropout=0.25)
        assert not any(module.training for module in model.modules())
        for path, layer in lora_layers(model).items():
            assert isinstance(layer, LoRALinear) and (layer.r, layer.scaling, layer.dropout) == (2, 3, 0.25), path
            assert layer.lora_A.shape == (2 * len(layer.slices or (0,)), layer.in_features)
            columns = sum(end - start for start, end in layer.slices) if layer.slices else layer.out_features
            assert (
                layer.lora_B.shape == (columns, 2)
                and not layer.lora_B.any()
                and layer.weight.shape[0] == layer.out_features
            )
