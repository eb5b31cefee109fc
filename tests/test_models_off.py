"""Adapters switched off: the model from before, bit for bit, and back again whatever happens."""

import copy

import pytest
import torch
from open_clip.transformer import Transformer
from torch.nn.parallel import DistributedDataParallel

from rsfast.models import adapters_off, add_adapters
from tests.test_models import every_model
from tests.tiny_clip import SIZE, assert_unchanged, features, inputs, snapshot, stir, tiny_clip


def assert_equal(a, b, equal=True):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) == equal


@every_model
@pytest.mark.parametrize("skip_padding", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_off_is_the_model_from_before(make, skip_padding, checkpointing):
    model = make().requires_grad_(False)
    before = features(model, *inputs())
    model.set_grad_checkpointing(checkpointing)
    add_adapters(model, **SIZE, skip_padding=skip_padding)
    stir(model).train()  # nothing in these models depends on the mode but PyTorch's choice of attention
    on, state = features(model, *inputs()), snapshot(model)
    with adapters_off(model):
        assert not torch.is_grad_enabled()
        model.eval()
        off = model.encode_image(inputs()[0]), model.encode_text(inputs()[1])
        with adapters_off(model):  # inside another nothing is left to switch off
            assert_equal(features(model, *inputs()), before)
        assert_equal(features(model, *inputs()), before)
        model.train()
    assert_equal(off, before)
    assert_unchanged(model, state)
    transformers = [m for m in model.modules() if isinstance(m, Transformer)]
    assert [m.grad_checkpointing for m in transformers] == [checkpointing] * 2
    if skip_padding:
        with pytest.raises(RuntimeError, match="encode_text"):  # no lengths of inside are left to be taken
            transformers[1](torch.zeros(3, 7, 24))
    assert_equal(features(model, *inputs()), on)
    assert_equal(on, before, equal=False)


def test_errors_inside_bring_the_adapters_back():
    model = tiny_clip()
    add_adapters(model, **SIZE, skip_padding=True)
    stir(model)
    on, state = features(model, *inputs()), snapshot(model)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    with pytest.raises(IndexError), adapters_off(model):
        model.encode_text(torch.full((1, 7), 99))  # no such token
    assert torch.is_grad_enabled()
    assert_unchanged(model, state)
    assert_equal(features(model, *inputs()), on)
    with pytest.raises(ValueError, match="model has no adapters"), adapters_off(tiny_clip()):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_notice(tmp_path, checkpointing):
    """Off between forward and backward, also under DDP, whose copies of the model are this very module."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        grads = []
        for wrap, off in ((copy.copy, False), (copy.copy, True), (DistributedDataParallel, True)):
            model = tiny_clip()
            add_adapters(model, **SIZE, skip_padding=True)
            model.set_grad_checkpointing(checkpointing)
            a, b, scale = wrap(stir(model).train())(*inputs())
            if off:
                with adapters_off(model):
                    features(model, *(x.flip(0) for x in inputs()))
            (scale * a @ b.T).square().mean().backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0
        for other in grads[1:]:
            assert torch.equal(grad, other[name]), name
