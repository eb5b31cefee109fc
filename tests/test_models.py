"""Adapters inside whole open_clip models."""

import copy
import pickle

import open_clip
import pytest
import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from torch.nn.parallel import DistributedDataParallel

from rsfast.models import add_adapters, remove_adapters
from tests.tiny_clip import (
    CUSTOM,
    END,
    SIZE,
    assert_unchanged,
    features,
    inputs,
    snapshot,
    stir,
    tiny_clip,
    tiny_custom_text_clip,
)


def lnd_clip():
    """A model whose blocks run (tokens, samples, width), as open_clip 2.x did."""
    model = tiny_clip()
    for transformer in (model.visual.transformer, model.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    return model


MODELS = {
    "clip": tiny_clip,
    "custom_text": tiny_custom_text_clip,
    "custom_blocks": lambda: tiny_clip(vision=CUSTOM, text=CUSTOM),
    "lnd": lnd_clip,
    "quick_gelu": lambda: tiny_clip(quick_gelu=True),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
@pytest.mark.parametrize("freeze", [True, False])
def test_outputs_are_the_models_own_until_trained(make, freeze):
    model = make()
    model.requires_grad_(not freeze)  # PyTorch's matmul rounds otherwise for frozen weights: compare like with like
    before = features(model, *inputs())
    add_adapters(model, **SIZE, freeze=freeze)
    for a, b in zip(features(model, *inputs()), before, strict=True):
        assert torch.equal(a, b)
    stir(model)
    for a, b in zip(features(model, *inputs()), before, strict=True):
        assert not torch.allclose(a, b, atol=1e-3)  # the adapters are in the path, in every sample


@every_model
def test_samples_never_mix(make):
    model = make()
    add_adapters(model, **SIZE)
    stir(model)
    images, texts = inputs()
    before = features(model, images, texts)
    images, texts = images.clone(), texts.clone()
    images[1] += 1
    texts[1, 1:3] = texts[1, 1:3].flip(0)
    for a, b in zip(features(model, images, texts), before, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        assert not torch.equal(a[1], b[1])


def test_layouts_agree():
    outputs = []
    for make in (tiny_clip, lnd_clip):
        model = make().double()
        add_adapters(model, **SIZE)
        images, texts = inputs()
        outputs.append(features(stir(model), images.double(), texts))
    for a, b in zip(*outputs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)  # fp64; the layout changes the order of sums


@every_model
@pytest.mark.parametrize("skip_padding", [False, True])
def test_removing_restores_everything(make, skip_padding):
    model = make()
    if make is not MODELS["custom_text"]:
        model.lock_image_tower(unlocked_groups=2)
    model.train()
    before, outputs = snapshot(model), features(model, *inputs())
    add_adapters(model, **SIZE, skip_padding=skip_padding)
    assert model.state_dict().keys() > before[0].keys()
    stir(model)
    model.logit_scale.data += 1
    remove_adapters(model)
    assert_unchanged(model, before)
    for a, b in zip(features(model, *inputs()), outputs, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no adapters"):
        remove_adapters(model)
    add_adapters(model, **SIZE)  # and it can be done again


@pytest.mark.parametrize("skip_padding", [False, True])
def test_copies_are_independent_and_whole(skip_padding):
    model = tiny_clip()
    before = snapshot(model)
    add_adapters(model, **SIZE, skip_padding=skip_padding)
    stir(model)
    expected = features(model, *inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(features(twin, *inputs()), expected, strict=True):
            assert torch.equal(a, b)
        assert twin.visual.transformer.resblocks[0].adapter.shared is twin.transformer.resblocks[0].adapter.shared
        remove_adapters(twin)
        assert_unchanged(twin, before)
        for a, b in zip(features(model, *inputs()), expected, strict=True):
            assert torch.equal(a, b)


def test_blocks_stay_what_they_are():
    for options, kind in (
        ({}, ResidualAttentionBlock),
        ({"vision": CUSTOM, "text": CUSTOM}, CustomResidualAttentionBlock),
    ):
        model = tiny_clip(**options)
        add_adapters(model, **SIZE)
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            assert isinstance(block, kind) and block.get_weight_dtype() == torch.float32
        model.load_state_dict(tiny_clip(**options).state_dict(), strict=False)
        model.lock_image_tower(unlocked_groups=1)
        model.lock_text_tower()


@every_model
@pytest.mark.parametrize("skip_padding", [False, True])
def test_checkpointing_changes_nothing(make, skip_padding):
    """Two texts are encoded before one backward: each recomputation needs the lengths of its own batch."""
    grads = []
    for checkpointing in (False, True):
        model = make()
        add_adapters(model, **SIZE, skip_padding=skip_padding)
        stir(model).train()
        model.set_grad_checkpointing(checkpointing)
        images, texts = inputs()
        loss = model.encode_image(images).square().sum() + model.encode_text(texts).square().sum()
        loss = loss + model.encode_text(texts.flip(0)[:2]).pow(3).sum()
        loss.backward()
        grads.append(
            {name: p.grad for name, p in model.named_parameters() if name != "logit_scale" and p.requires_grad}
        )
    plain, recomputed = grads
    assert len(plain) > 40
    for name, grad in plain.items():
        assert grad.abs().max() > 0 and torch.equal(grad, recomputed[name]), name


def test_parameter_counts_of_the_paper():
    """papers.md 1.4: 5,934,397 trainable parameters on ViT-B/32, whether the towers share or not."""
    model = open_clip.create_model("ViT-B-32")
    for share in ("text", "both"):
        report = add_adapters(model, share=share)
        assert report.trainable_parameters == 5_934_397
        assert len(report.placed) == 24 and len(report.shared) == 12 and not report.beyond
        assert "5,934,397" in str(report)
        remove_adapters(model)
    assert add_adapters(model, share=None).trainable_parameters == 5_934_397 - 398_604


def test_who_owns_what():
    model = tiny_clip()
    report = add_adapters(model, **SIZE)
    vision, text = model.visual.transformer.resblocks, model.transformer.resblocks
    assert [v.adapter.shared is t.adapter.shared for v, t in zip(vision, text, strict=False)] == [True, True]
    assert len({id(block.adapter.shared) for block in [*vision, *text]}) == 3
    assert report.placed[3:] == ("transformer.resblocks.0", "transformer.resblocks.1")
    assert report.shared[1] == ("visual.transformer.resblocks.1", "transformer.resblocks.1")
    assert report.beyond == ("visual.transformer.resblocks.2",)
    assert "visual.transformer.resblocks.0 to 2, transformer.resblocks.0 to 1" in str(report)
    assert "beyond the other tower: visual.transformer.resblocks.2\n" in str(report)
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.endswith("shared.gate") for name in names) == 3  # an optimizer and DDP see each once
    remove_adapters(model)

    report = add_adapters(model, **SIZE, share="text")
    assert all(block.adapter.shared is None for block in vision) and len(report.shared) == 2 and not report.beyond
    remove_adapters(model)
    assert add_adapters(model, **SIZE, share=None).shared == ()
    remove_adapters(model)
    report = add_adapters(model, **SIZE, towers=("visual",))
    assert len(report.placed) == len(report.beyond) == 3 and list(report.skipped) == ["text"]


def test_freezing():
    model = tiny_clip(init_logit_bias=-10.0)
    model.lock_image_tower()
    model.logit_scale.requires_grad_(False)
    report = add_adapters(model, **SIZE)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name or name == "logit_scale" for name in trainable) and "logit_scale" in trainable
    assert report.trainable_parameters == sum(p.numel() for p in trainable.values())
    remove_adapters(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not before["logit_scale"] and before["logit_bias"]

    add_adapters(model, **SIZE, freeze=False)
    now = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(now[name] == flag for name, flag in before.items())
    model.logit_scale.data.fill_(3)
    remove_adapters(model)
    assert model.logit_scale.item() == 3  # whoever trains the backbone keeps what was trained


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_bf16", "fp64"])
def test_precisions(precision):
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    model = tiny_clip(vision={"ls_init_value": None}, cast_dtype=half).requires_grad_(False)
    if half:
        open_clip.model.convert_weights_to_lp(model, half)
    else:
        model.to(torch.bfloat16 if precision == "pure_bf16" else torch.float64)
    dtype = model.transformer.get_cast_dtype()
    images, texts = inputs()
    before = features(model, images.to(dtype), texts)
    add_adapters(model, **SIZE)
    expected = torch.float64 if precision == "fp64" else torch.float32
    assert {p.dtype for n, p in model.named_parameters() if ".adapter." in n} == {expected}
    for a, b in zip(features(model, images.to(dtype), texts), before, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    stir(model)
    (model.encode_image(images.to(dtype)).float().square().sum() + model.encode_text(texts).float().sum()).backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if ".adapter." in n)


def test_compiles_in_one_graph():
    model = tiny_clip()
    add_adapters(model, **SIZE, skip_padding=True)
    stir(model)
    images, texts = inputs()
    expected = features(model, images, texts)
    visual = torch.compile(model.visual, fullgraph=True, backend="aot_eager")(images)
    text = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")(texts)
    assert torch.allclose(visual, expected[0], atol=1e-6) and torch.allclose(text, expected[1], atol=1e-6)
    assert torch.equal(model.encode_text(texts), expected[1])  # and leaves nothing behind


def test_ddp_trains_a_shared_sub_adapter(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        grads = []
        for wrap in (lambda model: model, DistributedDataParallel):
            model = tiny_clip()
            add_adapters(model, **SIZE)
            a, b, scale = wrap(stir(model))(*inputs())
            (scale * a @ b.T).square().mean().backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def rn50():
    return tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32})


def timm_trunk():
    return tiny_clip(vision={"timm_model_name": "vit_tiny_patch16_224"})


def other_block():
    model = tiny_clip()
    model.transformer.resblocks[1] = torch.nn.Identity()
    return model


def mixed_layout():
    model = tiny_clip()
    model.visual.transformer.batch_first = False
    return model


def last_pool():
    return tiny_custom_text_clip(text={"pool_type": "last"})


def class_token():
    return tiny_custom_text_clip(text={"embed_cls": True})


def taken_name():
    model = tiny_clip()
    model.visual.transformer.resblocks[2].adapter = torch.nn.Linear(2, 2)
    return model


REFUSED = [
    (rn50, {}, NotImplementedError, "visual.*ModifiedResNet"),
    (timm_trunk, {}, NotImplementedError, "visual.*TimmModel"),
    (other_block, {}, NotImplementedError, r"transformer\.resblocks\.1.*Identity"),
    (mixed_layout, {}, NotImplementedError, r"visual\.transformer\.resblocks\.0\.attn\.batch_first"),
    (last_pool, {"skip_padding": True}, NotImplementedError, "skip_padding.*'last'"),
    (class_token, {"skip_padding": True}, NotImplementedError, "class token"),
    (taken_name, {}, ValueError, r"visual\.transformer\.resblocks\.2.*'adapter'.*Linear"),
    (lambda: torch.nn.Linear(2, 2), {}, TypeError, "CLIP.*got Linear"),
    (tiny_clip, {"share": "vision"}, ValueError, "share.*'vision'"),
    (tiny_clip, {"share": True}, ValueError, "share.*True"),
    (tiny_clip, {"towers": ()}, ValueError, "towers"),
    (tiny_clip, {"towers": "visual"}, ValueError, "towers.*'visual'"),
    (tiny_clip, {"towers": ("image",)}, ValueError, "towers.*image"),
    (tiny_clip, {"towers": ("text", "text")}, ValueError, "towers"),
    (tiny_clip, {"towers": ("visual",), "share": "text"}, ValueError, "share='text' needs the text tower"),
    (tiny_clip, {"towers": ("visual",), "skip_padding": True}, ValueError, "skip_padding.*text tower"),
    (tiny_clip, {"bottleneck": 0}, ValueError, "bottleneck.*0"),
    (tiny_clip, {"bottleneck": 32.0}, ValueError, r"bottleneck.*32\.0"),
    (tiny_clip, {"bottleneck": 36, "num_heads": 8}, ValueError, "bottleneck.*36"),
    (tiny_clip, {"bottleneck": 24, "num_heads": 8}, ValueError, "bottleneck must be a multiple of 16.*24"),
    (tiny_clip, {"num_heads": -1}, ValueError, "num_heads.*-1"),
    (tiny_clip, {"freeze": "no"}, ValueError, "freeze must be True or False, got 'no'"),
    (tiny_clip, {"skip_padding": 1}, ValueError, "skip_padding must be True or False, got 1"),
    (tiny_clip, {"impl": "triton"}, ValueError, "impl.*'triton'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED)
def test_refusals_leave_the_model_alone(make, options, error, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add_adapters(model, **{**SIZE, **options})
    assert_unchanged(model, before)


def test_a_tower_that_cannot_be_served_may_be_left_out():
    report = add_adapters(rn50(), **SIZE, towers=("text",), share="text")
    assert len(report.placed) == len(report.shared) == 2


def test_adding_twice_is_refused():
    model = tiny_clip()
    add_adapters(model, **SIZE)
    before = snapshot(model)
    with pytest.raises(ValueError, match="already"):
        add_adapters(model, **SIZE)
    assert_unchanged(model, before)


@pytest.mark.parametrize("make", [tiny_clip, tiny_custom_text_clip])
def test_a_block_refuses_another_sequence(make):
    model = make()
    add_adapters(model, **SIZE)
    x = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="k_x"):
        model.visual.transformer.resblocks[0](x, x)


TEXTS_AND_POOLS = {
    "argmax": tiny_clip,
    "custom_text_argmax": tiny_custom_text_clip,
    "eos": lambda: tiny_custom_text_clip(text={"pool_type": "eos", "eos_id": END}),
    "clip_eos": lambda: tiny_clip(text={"pool_type": "eos", "eos_id": END}),
    "lnd": lnd_clip,
    "custom_blocks": lambda: tiny_clip(text=CUSTOM),
}


@pytest.mark.parametrize("make", TEXTS_AND_POOLS.values(), ids=TEXTS_AND_POOLS)
def test_padding_can_be_skipped(make):
    _, texts = inputs()
    padded = torch.where((texts == END).cumsum(1) - (texts == END).int() > 0, torch.tensor(33), texts)
    assert not torch.equal(texts, padded)
    for skip_padding in (False, True):
        model = make()
        add_adapters(model, **SIZE, skip_padding=skip_padding)
        stir(model)
        a, b = model.encode_text(texts), model.encode_text(padded)
        assert torch.equal(a, b) == skip_padding
        again = model.forward_intermediates(text=padded, normalize=False, image_output_fmt="NLC")["text_features"]
        assert torch.equal(b, again)


def test_skipping_padding_needs_token_ids():
    model = tiny_clip()
    add_adapters(model, **SIZE, skip_padding=True)
    model.encode_text(inputs()[1])
    with pytest.raises(RuntimeError, match="encode_text"):
        model.transformer(torch.zeros(3, 7, 24))
