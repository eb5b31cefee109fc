"""Training with LoRA in models: precisions, checkpointing, compilation, copies, PEFT as the oracle."""

import copy
import pickle

import peft
import pytest
import torch
from open_clip.model import convert_weights_to_lp
from torch.nn.parallel import DistributedDataParallel

from rsfast.models import add_lora, lora_layers, remove_lora, set_adapter_ids
from rsfast.testing import assert_within_budget
from tests.lora_models import build, run, stir_lora
from tests.tiny_clip import assert_unchanged, features, inputs, snapshot, tiny_clip

IDS = torch.tensor([1, -1, 0])


def with_lora(name="clip", adapters=1, **options):
    model, batch = build(name)
    add_lora(model, r=2, alpha=3, num_adapters=adapters, **options)
    if adapters > 1:
        set_adapter_ids(model, IDS)
    return stir_lora(model), batch


def gradients(model, batch):
    factors = [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]
    y = run(model, batch)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, factors, dy)]


PEFT = {  # our targets, PEFT's
    "timm": (("out", "fc", "qkv"), ["attn.proj", "fc1", "qkv"]),
    "eva_separate": (("q", "v", "proj", "fc"), ["q_proj", "v_proj", "fc2", "fc1_g", "fc1_x"]),
    "hf_clip": (("q", "k", "v", "out", "fc", "proj"), ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "timm_in_open_clip": (("trunk.attn_pool.kv", "visual.head"), ["trunk.attn_pool.kv", "visual.head"]),
}


@pytest.mark.parametrize("name", PEFT)
def test_values_and_gradients_are_pefts(name):
    targets, theirs = PEFT[name]
    model, batch = build(name)
    reference = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, target_modules=theirs)
    ).eval()
    report = add_lora(model, r=2, alpha=3, targets=targets, impl="reference")
    stir_lora(model)
    wrapped = {p: m for p, m in reference.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped.keys() == report.placed.keys() and set(report.placed.values()) == {None}
    for path, layer in lora_layers(model).items():
        for mine, other in ((layer.lora_A, wrapped[path].lora_A), (layer.lora_B, wrapped[path].lora_B)):
            other["default"].weight.data.copy_(mine)
    y = run(reference, batch)
    ours = gradients(model, batch)
    factors = [getattr(wrapped[path], f)["default"].weight for path in lora_layers(model) for f in ("lora_A", "lora_B")]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    for mine, other in zip(ours, [y, *torch.autograd.grad(y, factors, dy)], strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-12 * other.abs().max().item())
    assert report.trainable_parameters == sum(p.numel() for p in reference.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, adapters", [("clip", 1), ("clip", 2), ("lnd", 1), ("timm_in_open_clip", 2)])
def test_checkpointing_computes_the_same_bits(name, adapters):
    model, batch = with_lora(name, adapters, dropout=0.3)
    model.train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(6)
        results.append(gradients(model, batch))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(7)
    assert not torch.equal(gradients(model, batch)[0], results[0][0])  # dropout is on


@pytest.mark.parametrize(
    "name, adapters",
    [("clip", 1), ("clip", 2), ("custom_blocks", 1), ("main", 1), ("main", 2), ("coca", 1), ("timm", 1)],
)
def test_compiles_as_one_graph(name, adapters):
    model, args = with_lora(name, adapters)
    parts = {"clip": lambda m: m.visual.transformer.resblocks[0], "coca": lambda m: m.visual.attn_pool}
    part = parts.get(name, parts["clip"] if name == "custom_blocks" else lambda m: m)(model)
    if part is not model:
        args = (torch.randn(3, 5, 32, dtype=torch.double),)
    torch._dynamo.reset()
    fast = torch.compile(part, fullgraph=True, backend="aot_eager" if name == "clip" else "eager")
    factors = [factor for layer in lora_layers(part).values() for factor in (layer.lora_A, layer.lora_B)]
    for _ in range(adapters):
        results = [run(f, args) for f in (part, fast)]
        for a, b in zip(*([y, *torch.autograd.grad(y.sum(), factors)] for y in results), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item())
        set_adapter_ids(model, IDS.flip(0)) if adapters > 1 else None


@pytest.mark.parametrize("how", ["autocast", "bf16", "fp16", "bf16_layers"])
def test_half_precision_is_as_exact_as_the_frozen_model(how):
    dtype = torch.float16 if how == "fp16" else torch.bfloat16
    images, texts = inputs()

    def run_in(model, double=False):
        if double:
            exact = tiny_clip(vision=vision).double()  # its LayerNorms do not go through fp32
            exact.load_state_dict(model.state_dict())
            return features(exact, images.double(), texts)
        if how == "autocast":
            with torch.autocast("cpu", dtype):
                return features(model, images, texts)
        return features(model, images.to(dtype), texts)

    vision = {"ls_init_value": None} if how == "bf16_layers" else {}  # LayerScale would stay in fp32
    plain = tiny_clip(vision=vision, cast_dtype=dtype if how == "bf16_layers" else None)
    if how == "bf16_layers":
        convert_weights_to_lp(plain, dtype)
    elif how != "autocast":
        plain.to(dtype)
    model = copy.deepcopy(plain)
    add_lora(model, r=2)
    assert all(layer.lora_A.dtype == torch.float32 for layer in lora_layers(model).values())
    for y, gold, eager in zip(run_in(model), run_in(plain, double=True), run_in(plain), strict=True):
        assert_within_budget(y, gold, eager, terms=400)
    model(images.to(model.visual.conv1.weight.dtype), texts)[0].square().mean().backward()
    grads = [layer.lora_B.grad for path, layer in lora_layers(model).items() if path.startswith("visual")]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads)


def test_copies_are_independent_and_whole():
    for adapters in (1, 2):
        model, batch = build("clip")
        before = snapshot(model)
        add_lora(model, r=2, num_adapters=adapters)
        if adapters > 1:
            set_adapter_ids(model, IDS)
        y = run(stir_lora(model), batch)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, batch), y)
            with torch.no_grad():
                twin.visual.transformer.resblocks[0].attn.in_proj_weight.zero_()
            assert not torch.equal(run(twin, batch), y)  # its projection finds its own weight
            assert torch.equal(run(model, batch), y)
            twin = copy.deepcopy(model)
            remove_lora(twin)
            assert_unchanged(twin, before)


def test_weights_that_are_moved_or_loaded_are_the_ones_used_and_given_back():
    model, batch = with_lora()
    model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()}, assign=True)
    state = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    y = run(model, batch)
    other, _ = with_lora()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, batch), y)
    other.load_state_dict(tiny_clip().state_dict(), strict=False)
    model.float().double()
    remove_lora(model)
    assert model.state_dict().keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-6)
    assert type(model.visual.transformer.resblocks[0].attn) is torch.nn.MultiheadAttention


def test_open_clips_own_functions_still_work():
    model, batch = with_lora("custom_text")
    model.visual.init_parameters()
    model.text.init_parameters()
    assert model.text.transformer.get_cast_dtype() == torch.double
    model.lock_image_tower(unlocked_groups=1)
    model.lock_text_tower()
    run(model, batch)


def test_trains_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = with_lora()
        expected = gradients(model, batch)
        a, b, _ = DistributedDataParallel(model)(*batch)
        assert torch.equal(torch.cat([a.flatten(), b.flatten()]), expected[0][:-1])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(5):
            a, b, _ = model(*batch)
            losses.append(-(a * b).sum())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses == sorted(losses, reverse=True)
    finally:
        torch.distributed.destroy_process_group()
