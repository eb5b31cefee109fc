"""The attention with LoRA keeps every promise of ``nn.MultiheadAttention``: layouts, masks, weights, dropout."""

import copy
import itertools

import pytest
import torch
from torch import nn

from rsfast.models import add_lora, lora_attention, lora_layers, set_adapter_ids
from tests.lora_models import merged_weights, stir_lora

N, L, S, D, H = 3, 4, 5, 8, 2


def attentions(targets=("q", "k", "v", "out"), **options):
    """An attention with LoRA, and the weights that a plain one must have to be the same."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(D, H, **options).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.5)
    model = copy.deepcopy(plain)
    add_lora(model, r=2, targets=targets, impl="reference")
    stir_lora(model)
    weights = {name.removeprefix("."): weight for name, weight in merged_weights(model).items()}
    plain.load_state_dict({**plain.state_dict(), **weights})
    return model, plain


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=0, atol=1e-12)  # fp64 sums of a few terms, in another order


def tokens(batch_first, **shape):
    query, key, value = (torch.randn(N, length, width).double() for length, width in shape.values())
    return [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def masked(*shape):
    """True at random, but never at the first key: a query that attends to nothing has no answer."""
    return (draw(*shape) > 0.5) & (torch.arange(shape[-1]) > 0)


MASKS = {
    "none": {},
    "bool": {"attn_mask": masked(L, S)},
    "float": {"attn_mask": draw(L, S)},
    "each_head": {"attn_mask": masked(N * H, L, S)},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([[5], [2], [3]])},
    "float_padding": {"key_padding_mask": draw(N, S)},
    "both": {"attn_mask": draw(N * H, L, S), "key_padding_mask": masked(N, S)},
}
mismatched_masks_are_fine = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


@mismatched_masks_are_fine
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_masks_layouts_and_weights(mask, batch_first, bias):
    ours, theirs = attentions(batch_first=batch_first, bias=bias)
    query, key, value = tokens(batch_first, q=(L, D), k=(S, D), v=(S, D))
    for weights, average in itertools.product((True, False), (True, False)):
        options = MASKS[mask] | {"need_weights": weights, "average_attn_weights": average}
        assert_equal(ours(query, key, value, **options), theirs(query, key, value, **options))
        assert_equal(ours(query, key, key, **options), theirs(query, key, key, **options))
    if mask == "none":
        assert_equal(ours(query, query, query), theirs(query, query, query))


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("v", "out"), ("out",), ("in_proj", "out")], ids="-".join)
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 6}, {"kdim": 6, "vdim": 3}], ids=str)
def test_every_choice_of_projections_and_widths(targets, widths):
    if widths and "in_proj" in targets:
        targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    ours, theirs = attentions(targets, batch_first=True, **widths)
    query, key, value = tokens(True, q=(L, D), k=(S, widths.get("kdim", D)), v=(S, widths.get("vdim", D)))
    assert_equal(ours(query, key, value), theirs(query, key, value))
    if key.shape == value.shape:
        assert_equal(ours(query, key, key), theirs(query, key, key))
    if not widths:
        assert_equal(ours(query, query, query), theirs(query, query, query))


@mismatched_masks_are_fine
@pytest.mark.parametrize("weights", [True, False])
def test_causal_unbatched_and_dropout(weights):
    ours, theirs = attentions(batch_first=True, dropout=0.5)
    x = torch.randn(N, L, D).double()
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.double)
    padding = torch.arange(L) > torch.tensor([[1], [2], [3]])
    ours.eval(), theirs.eval()
    for options in ({}, {"key_padding_mask": padding}):
        options |= {"attn_mask": causal, "is_causal": True, "need_weights": weights}
        assert_equal(ours(x, x, x, **options), theirs(x, x, x, **options))
    options = {"attn_mask": causal, "need_weights": weights}
    assert_equal(ours(x[0], x[0], x[0], **options), theirs(x[0], x[0], x[0], **options))
    options["key_padding_mask"] = padding[0]
    assert_equal(ours(x[0], x[0], x[0], **options), theirs(x[0], x[0], x[0], **options))
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        results.append(model(x, x, x, need_weights=weights))
    assert_equal(*results)
    assert not torch.allclose(results[0][0], ours.eval()(x, x, x)[0])


def test_bad_arguments_are_named():
    model, _ = attentions(batch_first=True)
    x = torch.randn(N, L, D).double()
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True"):
        model(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(4, 4\) or \(6, 4, 4\), got \(3, 4, 4\)"):
        model(x, x, x, attn_mask=torch.zeros(N, L, L))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(3, 4\), got \(4, 3\)"):
        model(x, x, x, key_padding_mask=torch.zeros(L, N))
    with pytest.raises(ValueError, match="weight must be"):
        model(x[..., :6], x, x)


def test_adapters_of_a_batch_also_where_keys_come_from_elsewhere():
    model = nn.MultiheadAttention(D, H, batch_first=True).double()
    add_lora(model, r=2, num_adapters=2, impl="reference", targets=("q", "v", "out"))
    stir_lora(model)
    query, key, value = tokens(True, q=(L, D), k=(S, D), v=(S, D))
    with pytest.raises(ValueError, match="adapter_ids must be given"):
        model(query, key, value)
    set_adapter_ids(model, torch.tensor([1, -1, 0]))
    whole = [model(query, *rest)[0] for rest in ((key, value), (key, key), (query, query))]
    for j, g in enumerate((1, -1, 0)):
        set_adapter_ids(model, torch.tensor([g]))
        q, k, v = (x[j : j + 1] for x in (query, key, value))
        for together, rest in zip(whole, ((k, v), (k, k), (q, q)), strict=True):
            assert torch.allclose(model(q, *rest)[0][0], together[j], rtol=0, atol=1e-12)


def test_one_product_for_each_input(monkeypatch):
    """Self-attention projects once; another sequence's keys and values together; only targets have factors."""
    model, _ = attentions(("q", "v"), batch_first=True)
    monkeypatch.setattr(lora_attention, "_columns", lambda *args: pytest.fail("projected beside the layer"))
    calls, layer = [], model.in_proj
    assert (
        layer.lora_A.shape == (4, D) and layer.lora_B.shape == (2 * D, 2) and layer.slices == ((0, D), (2 * D, 3 * D))
    )
    layer.register_forward_hook(lambda module, args, y: calls.append(y.shape))
    x = torch.randn(N, L, D).double()
    model(x, x, x)
    assert calls == [(N, L, 3 * D)]
    assert list(lora_layers(model)) == ["in_proj"]
    spans, columns = [], type(layer).columns
    monkeypatch.setattr(type(layer), "columns", lambda self, *args: spans.append(args[1:]) or columns(self, *args))
    model(x, x + 1, x + 2)
    model(x, x.clone(), x)
    other = x + 1
    model(x, other, other)
    thirds = [(0, D), (D, 2 * D), (2 * D, 3 * D)]
    assert spans == [*thirds, *thirds, (0, D), (D, 3 * D)]
