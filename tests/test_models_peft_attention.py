"""PEFT's LoRA on ``nn.MultiheadAttention`` on the fused path; weights merged by hand are the oracle."""

import copy
import io
import itertools

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, MultiheadAttention
from torch import nn

import rsfast
from rsfast.models import patch_peft, peft_layers, unpatch
from rsfast.models.attention import attend, project
from rsfast.testing import assert_within_budget
from tests.tiny_clip import inputs, tiny_clip
from tests.tiny_peft import assert_same, gradients, make

ATTN = {"target_modules": ["attn"], "r": 3, "lora_alpha": 6}


class Block(nn.Module):
    """An attention with options, called with options."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **options)
        for parameter in self.attn.parameters():  # the biases would be zero
            nn.init.normal_(parameter, std=0.3)

    def forward(self, q, k=None, v=None, **call):
        k = q if k is None else k
        return self.attn(q, k, k if v is None else v, **call)[0]


def merged_by_hand(model, scale_of_out=1.0):
    """``forward`` of the model beneath, its attentions' weights being W + scaling B A, differentiable in A and B."""
    base, weights = copy.deepcopy(model).unload(), {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, MultiheadAttention):
            mha, out = layer.base_layer, layer.base_layer.out_proj
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            deltas = [sum(m.scaling[n] * m.lora_B[n].weight @ m.lora_A[n].weight for n in active) for m in (layer, out)]
            weights[f"{path}.in_proj_weight"] = mha.in_proj_weight + deltas[0]
            weights[f"{path}.out_proj.weight"] = out.base_layer.weight + scale_of_out * deltas[1]
        elif isinstance(layer, Linear) and ".base_layer." not in path:
            weights[f"{path}.weight"] = layer.base_layer.weight + layer.get_delta_weight("one")

    def call(*args, **kwargs):
        return torch.func.functional_call(base, weights, args, kwargs)

    return call


def unmerged_by_hand(model):
    """A block in plain PyTorch, with PEFT's formula for a linear layer in its dtype."""
    layer = model.base_model.model.attn

    def formula(part, weight, bias):
        def run(x, *_):
            y = F.linear(x, weight, bias)
            for name in part.active_adapters:
                y = y + part.lora_B[name](part.lora_A[name](x)) * part.scaling[name]
            return y

        return run

    base, out = layer.base_layer, layer.base_layer.out_proj
    columns = formula(layer, base.in_proj_weight, base.in_proj_bias)
    output = formula(out, out.base_layer.weight, out.base_layer.bias)
    return lambda x: attention(base, x, x, x, columns=columns, output=output)[0]


def attention(module, q, k, v, *, columns, output, **call):
    x, weights = attend(module, *project(q, k, v, module.embed_dim, columns), **call)
    return output(x), weights


def features(call):
    """Both towers' features as one tensor."""

    def run(images, texts):
        return torch.cat(call(images, texts)[:2])

    return run


def fused(model, **options):
    twin = copy.deepcopy(model)
    report = patch_peft(twin, **options)
    assert report.swapped and not report.skipped and not report.dead
    return twin


def clip(dtype=torch.float64, configs=(ATTN,), **options):
    return make(*configs, module=tiny_clip(**options), dtype=dtype)


@pytest.mark.parametrize("configs", [[ATTN], [{**ATTN, "lora_dropout": 0.5}, {**ATTN, "r": 2, "use_rslora": True}]])
def test_open_clip(configs, monkeypatch):
    model = clip(configs=configs)
    images, texts = inputs()
    expected = gradients(model, images.double(), texts, call=features(merged_by_hand(model)))
    twin = fused(model)
    monkeypatch.setattr(MultiheadAttention, "merge", None)
    monkeypatch.setattr(MultiheadAttention, "forward", None)
    assert_same(gradients(twin, images.double(), texts, call=features(twin)), expected)


def test_peft_counts_out_proj_twice():
    """Why ours differs. If PEFT's equals the weights merged once, it is mended: then the docstrings must say so."""
    model = clip()
    images, texts = inputs()
    args, x = (images.double(), texts), model.base_model.model
    once, twice = (features(merged_by_hand(model, scale))(*args) for scale in (1.0, 2.0))
    theirs, ours = features(x)(*args), fused(model)
    torch.testing.assert_close(theirs, twice, rtol=0, atol=1e-12)
    assert not torch.allclose(theirs, once, atol=1e-3)
    torch.testing.assert_close(features(ours)(*args), once, rtol=0, atol=1e-12)
    for layer in ours.modules():
        if isinstance(layer, MultiheadAttention):
            layer.base_layer.out_proj.set_scale("one", 2)
    torch.testing.assert_close(features(ours)(*args), theirs, rtol=0, atol=1e-12)


def test_merging_and_disabling():
    model = clip()
    images, texts = inputs()
    args, twin = (images.double(), texts), fused(model)
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    expected = features(merged_by_hand(model))(*args)
    with twin.disable_adapter(), model.disable_adapter():
        assert torch.equal(features(twin)(*args), features(model)(*args))
    for safe in (False, True):
        twin.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(features(twin)(*args), expected, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="attn is merged"):
            unpatch(twin)
        twin.unmerge_adapter()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-14)
    merged = twin.merge_and_unload()
    assert type(merged.visual.transformer.resblocks[0].attn) is nn.MultiheadAttention
    torch.testing.assert_close(features(merged)(*args), expected, rtol=0, atol=1e-12)


def test_merging_a_layer_by_itself():
    """PEFT's functions on the model visit ``out_proj`` too; the layer's own must not rely on that."""
    layer = fused(make(ATTN, module=Block())).base_model.model.attn
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    expected, weight = layer(x, x, x)[0], layer.base_layer.out_proj.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x, x, x)[0], expected, rtol=0, atol=1e-12)
    layer.enable_adapters(False)
    layer(x, x, x)  # unmerges, as PEFT's does
    assert not layer.merged and not layer.base_layer.out_proj.merged
    torch.testing.assert_close(layer.base_layer.out_proj.weight, weight, rtol=0, atol=1e-14)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_safe_merge_of_a_broken_adapter_changes_nothing():
    model = fused(make(ATTN, module=Block()))
    layer = model.base_model.model.attn
    for part in (layer, layer.base_layer.out_proj):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        part.lora_B["one"].weight.data[0] = torch.nan
        with pytest.raises(ValueError, match="broken"):
            model.merge_adapter(safe_merge=True)
        assert not layer.merged and not layer.base_layer.out_proj.merged
        part.lora_B["one"].weight.data.copy_(
            before[next(n for n, p in model.named_parameters() if p is part.lora_B["one"].weight)]
        )
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_merged_attention_is_left_alone():
    model = make(ATTN, module=Block())
    model.merge_adapter()
    report = patch_peft(model)
    assert report.swapped == ("base_model.model.attn.base_layer.out_proj",)
    assert "is merged" in report.skipped["base_model.model.attn"]


OPTIONS = [dict(zip(("batch_first", "bias", "add_bias_kv", "add_zero_attn"), o, strict=True))
           for o in itertools.product((True, False), repeat=4)]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(name for name in o if o[name]))
def test_every_way_to_call_it(options):
    """Against PyTorch's own module, for every layout, input, mask and result."""
    torch.manual_seed(0)
    module = Block(**options).attn.double()
    B, L, S = 2, 4, 5

    def columns(x, first, last):
        bias = module.in_proj_bias[first:last] if options["bias"] else None
        return F.linear(x, module.in_proj_weight[first:last], bias)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def batch(length):
        return draw(B, length, 12) if options["batch_first"] else draw(length, B, 12)

    x, context = batch(L), batch(S)
    for q, k, v in ((x, x, x), (x, context, context), (x, context, batch(S)), (draw(L, 12), *[draw(S, 12)] * 2)):
        s = L if q is k else S
        padding = torch.zeros(B, s, dtype=torch.bool)
        padding[0, -1] = True
        shape = (L, s) if q.ndim == 2 else (B * 3, L, s)
        for attn_mask in (None, draw(L, s), draw(*shape), torch.rand(L, s) > 0.8):
            for pad, weights, average in itertools.product((None, padding), (True, False), (True, False)):
                pad = pad[0] if pad is not None and q.ndim == 2 else pad
                if pad is not None and attn_mask is not None and attn_mask.dtype != torch.bool:
                    pad = torch.zeros_like(pad, dtype=torch.float64).masked_fill(pad, -1.5)
                call = dict(
                    key_padding_mask=pad, need_weights=weights, attn_mask=attn_mask, average_attn_weights=average
                )
                expected = module(q, k, v, **call)
                found = attention(module, q, k, v, **call, columns=columns, output=module.out_proj)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    for weights in (True, False):
        call = dict(attn_mask=causal, is_causal=True, need_weights=weights)
        expected = module(x, x, x, **call)
        found = attention(module, x, x, x, **call, columns=columns, output=module.out_proj)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_other_queries_keys_and_values(batch_first):
    """The adapter of the fused projection, when its thirds have inputs of their own; and a result of attention."""
    model = make(ATTN, module=Block(batch_first=batch_first))
    q, k, v = (torch.randn(4, 4, 12, generator=torch.Generator().manual_seed(j)).double() for j in range(3))
    for args in ((q, k, v), (q, k), (q,)):
        twin, hand = fused(model), merged_by_hand(model)
        assert_same(gradients(twin, *args), gradients(model, *args, call=hand))
    layer = fused(model).base_model.model.attn
    y, weights = layer(q, k, k)
    assert weights.shape == (4, 4, 4) and layer(q, k, k, need_weights=False)[1] is None
    assert y.dtype == weights.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_precision(dtype):
    base = torch.float32 if dtype == "autocast" else dtype
    model = make(ATTN, {**ATTN, "r": 2}, module=Block(batch_first=True), dtype=base)
    x = torch.randn(8, 9, 12, generator=torch.Generator().manual_seed(0)).to(base)
    twin, narrow = fused(model), copy.deepcopy(model).to(base)
    call = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    ours = gradients(twin, x, call=call(twin))
    eager = gradients(narrow, x, call=call(unmerged_by_hand(narrow)))
    model.double()
    gold = gradients(model, x.double(), call=merged_by_hand(model))
    for name in ours:
        assert_within_budget(ours[name], gold[name], eager[name].to(ours[name]), terms=100, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"], ids=str)
def test_result_has_the_dtype_that_peft_gives(dtype):
    base = torch.float32 if dtype == "autocast" else dtype
    model = make(ATTN, module=Block(), dtype=base)
    layers = [m.base_model.model.attn for m in (model, fused(model))]
    x = torch.randn(3, 2, 12).to(base)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        for weights in (True, False):
            theirs, ours = (layer(x, x, x, need_weights=weights) for layer in layers)
            assert [None if t is None else t.dtype for t in ours] == [None if t is None else t.dtype for t in theirs]


def test_weights_of_a_16_bit_model_do_not_drift():
    model = clip(torch.bfloat16)
    twin, args = fused(model), (inputs()[0].bfloat16(), inputs()[1])
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    parameters = {name: id(p) for name, p in twin.named_parameters()}
    features(twin)(*args).float().sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in twin.state_dict().items())
    assert {name: id(p) for name, p in twin.named_parameters()} == parameters


def test_dropout():
    """On the input of both factors' products, as rsfast.lora_linear draws it."""
    model = fused(make({**ATTN, "lora_dropout": 0.5}, module=Block(batch_first=True)))
    layer, x = model.base_model.model.attn, torch.randn(2, 4, 12, dtype=torch.float64)
    still = layer(x, x, x)[0]
    layer.train()
    torch.manual_seed(3)
    y = layer(x, x, x)[0]
    torch.manual_seed(3)
    base, out = layer.base_layer, layer.base_layer.out_proj
    seeds = iter([torch.randint(-(2**63), 2**63 - 1, ()) for _ in range(2)])

    def linear(part, weight, bias):
        def run(x, *_):
            A, B = part.lora_A["one"].weight, part.lora_B["one"].weight
            return rsfast.lora_linear(x, weight, bias, A, B, 2.0, dropout_p=0.5, seed=next(seeds))

        return run

    expected = attention(
        base, x, x, x, columns=linear(layer, base.in_proj_weight, base.in_proj_bias),
        output=linear(out, out.base_layer.weight, out.base_layer.bias),
    )[0]  # fmt: skip
    assert torch.equal(y, expected) and not torch.allclose(y, still)


def test_dead_adapters_are_reported():
    model = make({"target_modules": ["out_proj", "c_fc"]}, module=tiny_clip())
    report = patch_peft(model)
    dead = tuple(n for n, m in model.named_modules() if n.endswith("out_proj") and isinstance(m, Linear))
    assert report.dead == dead and len(dead) == 5 and all("c_fc" in path for path in report.swapped)
    assert "warning: the adapters of 5 layers train nothing" in str(report) and dead[0] in str(report)
    alone = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["out_proj"]), nn.MultiheadAttention(8, 2))
    assert patch_peft(alone).dead == ("out_proj",)


def test_files_names_and_classes(tmp_path):
    model = clip()
    model.save_pretrained(tmp_path / "before")
    names = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    twin = fused(model)
    assert isinstance(twin.base_model.model.visual.transformer.resblocks[0].attn, MultiheadAttention)
    assert list(twin.state_dict()) == names
    twin.save_pretrained(tmp_path / "patched")
    unpatch(twin)
    assert list(twin.state_dict()) == names and [type(m) for m in twin.modules()] == classes
    images, texts = inputs()
    assert torch.equal(features(twin)(images.double(), texts), features(model)(images.double(), texts))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = [tmp_path / folder / "one" / name for folder in ("before", "patched")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_copies_pickles_and_compiles():
    model = fused(make(ATTN, module=Block()))
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.attn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], expected, rtol=0, atol=1e-12)


def test_what_cannot_be_served_is_refused_by_name():
    model = fused(make(ATTN, module=Block()))
    layer, x = model.base_model.model.attn, torch.randn(3, 2, 12, dtype=torch.float64)
    with pytest.raises(TypeError, match="mixed adapter batches"):
        layer(x, x, x, adapter_names=["one"] * 3)
    with pytest.raises(ValueError, match="attn_mask must be given"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="the last two of one shape"):
        layer(x, x[:2], x)
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="base_layer has hooks: unpatch"):
        layer(x, x, x)
    handle.remove()
    layer(x, x, x)
    biased = make({**ATTN, "lora_bias": True}, module=Block())
    report = patch_peft(biased)
    assert not report.swapped and all("lora_bias" in why for why in report.skipped.values())


def test_one_product_for_self_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(
        peft_layers, "lora_linear", lambda *a, **k: calls.append(a[1].shape) or rsfast.lora_linear(*a, **k)
    )
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    fused(make(ATTN, module=Block()))(x)
    assert calls == [(36, 12), (12, 12)]
