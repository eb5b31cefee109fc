"""What the in-batch losses take and refuse: dtypes, devices, options, and the messages that name what is wrong."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F

import rsfast
from rsfast.similarity import reference
from rsfast.similarity.functional import checks, one_way_loss, one_way_sigmoid_loss
from tests.pairs import features, number, same_gradients

SCALE, IDS = torch.tensor(5.0), torch.arange(4)


def uniformity(image_features, text_features, **options):
    return rsfast.uniformity_loss(image_features, **options)


SCALED = {  # every loss as one of two features, and what else it needs
    "contrastive": functools.partial(rsfast.contrastive_loss, logit_scale=SCALE),
    "harma": functools.partial(rsfast.harma_loss, logit_scale=SCALE),
    "sigmoid": functools.partial(rsfast.sigmoid_loss, logit_scale=SCALE),
    "affiliation": functools.partial(rsfast.affiliation_loss, labels=IDS, logit_scale=SCALE),
}
TRIPLETS = {"triplet": rsfast.triplet_loss, "adaptive_triplet": rsfast.adaptive_triplet_loss}
PAIRED = SCALED | TRIPLETS | {"alignment": rsfast.alignment_loss}
LOSSES = PAIRED | {"uniformity": uniformity}
CHOOSING = {name: loss for name, loss in LOSSES.items() if name not in ("alignment", "affiliation")}


def one(loss):
    """HarMA's pair as one number, so that there is a gradient to ask for."""
    return sum(loss) if isinstance(loss, tuple) else loss


def batch(*rows, dtype=torch.float32, width=12):
    return [x.detach().to(dtype).requires_grad_() for x in features(*rows, width=width)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_fp32_and_gradients_are_in_the_features_dtype(name, dtype):
    image, text = batch(4, 4, dtype=dtype)
    loss = one(LOSSES[name](image, text))
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    grads = torch.autograd.grad(loss, (image, text), allow_unused=name == "uniformity")
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", CHOOSING)
def test_only_the_products_are_in_the_features_dtype(name, dtype):
    """Similarities that the dtype holds exactly: all else is what fp32 features of the same values give."""
    image, text = torch.eye(4, 8, dtype=dtype), torch.eye(4, 8, dtype=dtype).roll(1, 0) / 2
    options = {} if name == "uniformity" else dict(margin=0.3) if "triplet" in name else {}
    assert torch.equal(
        one(LOSSES[name](image, text, **options)), one(LOSSES[name](image.float(), text.float(), **options))
    )


@pytest.mark.parametrize("name", LOSSES)
def test_normalizing_inside_is_normalizing_outside(name):
    torch.manual_seed(0)
    image, text = (torch.randn(4, 12, dtype=torch.double, requires_grad=True) for _ in "ab")
    leaves = [image] if name == "uniformity" else [image, text]
    inside = one(LOSSES[name](image, text, normalize=True))
    outside = one(LOSSES[name](F.normalize(image, dim=-1), F.normalize(text, dim=-1)))
    assert same_gradients(inside, outside, leaves)
    assert inside != one(LOSSES[name](image, text))


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_takes_the_products_to_its_dtype(name):
    image, text = batch(4, 4)
    low = one(LOSSES[name](image.bfloat16(), text.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = one(LOSSES[name](image, text))
        mixed = one(LOSSES[name](image.bfloat16(), text))
        exact = one(LOSSES[name](image.double(), text.double()))
    assert inside.dtype == torch.float32 and torch.equal(inside, low) and torch.equal(mixed, low)
    assert torch.equal(exact, one(LOSSES[name](image.double(), text.double())))
    (grad,) = torch.autograd.grad(inside, image)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("shape", ((), (1,), (1, 1)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("name", SCALED)
def test_the_scale_is_one_number_of_any_shape_and_dtype(name, shape, dtype):
    image, text = batch(4, 4)
    scale = torch.full(shape, 5.0, dtype=dtype, requires_grad=True)
    loss = one(SCALED[name](image, text, logit_scale=scale))
    assert loss.dtype == torch.float32 and torch.equal(loss, one(SCALED[name](image, text)))
    (grad,) = torch.autograd.grad(loss, scale)
    assert grad.shape == shape and grad.dtype == dtype and grad != 0
    seen = checks.prepared_number("logit_scale", scale, image, positive=True, check_finite=False)
    assert seen.shape == () and seen.dtype == torch.float32  # by kernels, whatever was given


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_on_the_cpu_serves_features_on_a_gpu(name):
    image, text = (x.cuda() for x in batch(4, 4))
    scale = torch.tensor(5.0, requires_grad=True)
    options = dict(labels=IDS.cuda()) if name == "affiliation" else {}
    one(SCALED[name](image, text, logit_scale=scale, **options)).backward()
    assert scale.grad.device.type == "cpu" and scale.grad != 0


@pytest.mark.parametrize("dtype", checks.INTEGERS)
def test_ids_are_any_integers(dtype):
    image, text = batch(4, 4)
    ids = torch.tensor((3, 3, 5, 7))
    assert torch.equal(*(rsfast.contrastive_loss(image, text, SCALE, image_ids=i) for i in (ids, ids.to(dtype))))


def test_ids_far_apart_stay_apart():
    image, text = batch(4, 4)
    near, far = torch.tensor((0, 1, 2, 2)), torch.tensor((0, 2**32, 2**60, 2**60))  # equal in 32 bits, or in a float
    assert torch.equal(*(rsfast.contrastive_loss(image, text, SCALE, image_ids=i) for i in (near, far)))


def test_a_frozen_side_and_no_gradient_at_all():
    for loss in PAIRED.values():
        image, text = batch(4, 4)
        (grad,) = torch.autograd.grad(one(loss(image, text)), image)
        (alone,) = torch.autograd.grad(one(loss(image, text.detach())), image)
        assert torch.equal(grad, alone)
        with torch.no_grad():
            assert not one(loss(image, text)).requires_grad


def test_permuting_the_batch_permutes_the_gradients():
    order = torch.tensor((2, 0, 3, 1))
    for name, loss in LOSSES.items():
        image, text = features(4, 4)
        leaves, options = [image] if name == "uniformity" else [image, text], {}
        if name == "affiliation":
            options = dict(labels=torch.tensor((1, 1, 2, 3)))
        plain = torch.autograd.grad(one(loss(image, text, **options)), leaves)
        options = {key: labels[order] for key, labels in options.items()}
        turned = torch.autograd.grad(one(loss(image[order], text[order], **options)), leaves)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(plain, turned, strict=True)), name


ONES = torch.ones(4, 8)
BAD_FEATURES = {  # of every loss of two features
    "image_features must be floating point (N, D), got torch.float32 of shape (8,)": (torch.ones(8), ONES),
    "image_features must be floating point (N, D), got list": ([[1.0]], ONES),
    "text_features must be floating point (N, D), got torch.int64": (ONES, ONES.long()),
    "text_features must be floating point (N, D), got torch.float8_e4m3fn": (ONES, ONES.to(torch.float8_e4m3fn)),
    "image_features must be at least 1 wide, got shape (4, 0)": (ONES[:, :0], ONES[:, :0]),
    "text_features must be 8 wide, as image_features, got 9": (ONES, torch.ones(4, 9)),
    "text_features must have dtype torch.float32, as image_features, got torch.float16": (ONES, ONES.half()),
    "text_features must have device cpu, as image_features, got meta": (ONES, ONES.to("meta")),
    "the batch is empty: 0 rows of image_features, 0 rows of text_features": (ONES[:0], ONES[:0]),
    "the batch is empty: 4 rows of image_features, 0 rows of text_features": (ONES, ONES[:0]),
    "a batch needs 2 rows or more, got 1": (ONES[:1], ONES[:1]),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("message", BAD_FEATURES)
def test_bad_features_are_named(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PAIRED[name](*BAD_FEATURES[message])


@pytest.mark.parametrize("name", [name for name in PAIRED if name != "contrastive"])
def test_only_the_contrastive_loss_may_be_rectangular(name):
    with pytest.raises(ValueError, match="text_features must have 4 rows, one an image, got 3"):
        PAIRED[name](ONES, ONES[:3])


WITH_IDS = {"contrastive": SCALED["contrastive"], "harma": SCALED["harma"], **TRIPLETS}
META, ROW = IDS.to("meta"), IDS[:, None]
BAD = {  # message -> losses that give it, and the options
    "image_ids must be 4 integers, one a row, got torch.int64 of shape (3,)": (WITH_IDS, dict(image_ids=IDS[:3])),
    "image_ids must be 4 integers, one a row, got torch.int64 of shape (4, 1)": (WITH_IDS, dict(image_ids=ROW)),
    "image_ids must be 4 integers, one a row, got torch.float32": (WITH_IDS, dict(image_ids=torch.ones(4))),
    "image_ids must be 4 integers, one a row, got torch.bool": (WITH_IDS, dict(image_ids=IDS > 1)),
    "image_ids must be 4 integers, one a row, got list": (WITH_IDS, dict(image_ids=[1, 2, 3, 4])),
    "image_ids must be on cpu, as the features are, got meta": (WITH_IDS, dict(image_ids=META)),
    "text_ids must be 4 integers, one a row": (
        {"contrastive": SCALED["contrastive"], **TRIPLETS}, dict(image_ids=IDS, text_ids=IDS[:3])),
    "image_ids are needed where text_ids are given": (
        {"contrastive": SCALED["contrastive"], **TRIPLETS}, dict(text_ids=IDS)),
    "image_ids are needed with mask_same_id=True": (TRIPLETS, dict(mask_same_id=True)),
    "labels must be 4 integers, one a row, got None": (["affiliation"], dict(labels=None)),
    "labels must be 4 integers, one a row, got torch.float32": (["affiliation"], dict(labels=torch.ones(4))),
    "logit_scale must be a tensor that holds one floating point number, got torch.float32 of shape (2,)": (
        SCALED, dict(logit_scale=torch.ones(2))),
    "logit_scale must be a tensor that holds one floating point number, got float": (SCALED, dict(logit_scale=14.0)),
    "logit_scale must be a tensor that holds one floating point number, got torch.int64": (
        SCALED, dict(logit_scale=torch.tensor(14))),
    "logit_scale must be on cpu, as the features are, or on the CPU, got meta": (
        SCALED, dict(logit_scale=torch.ones((), device="meta"))),
    "logit_scale must be positive and finite, got 0.0": (SCALED, dict(logit_scale=torch.tensor(0.0))),
    "logit_scale must be positive and finite, got -2.0": (SCALED, dict(logit_scale=torch.tensor([-2.0]))),
    "logit_scale must be positive and finite, got nan": (SCALED, dict(logit_scale=torch.tensor(float("nan")))),
    "logit_scale must be positive and finite, got inf": (SCALED, dict(logit_scale=torch.tensor(float("inf")))),
    "logit_bias must be a tensor that holds one": (["sigmoid"], dict(logit_bias=-10.0)),
    "logit_bias must be finite, got nan": (["sigmoid"], dict(logit_bias=torch.tensor(float("nan")))),
    "label_smoothing must be between 0 and 1, got 1.5": (["contrastive"], dict(label_smoothing=1.5)),
    "label_smoothing must be between 0 and 1, got nan": (["contrastive"], dict(label_smoothing=float("nan"))),
    "negatives must be 'all' or 'hardest', got 'some'": (TRIPLETS, dict(negatives="some")),
    "margin must be a finite number, got inf": ({"harma", *TRIPLETS}, dict(margin=float("inf"))),
    "margin must be a number, got None": ({"harma", *TRIPLETS}, dict(margin=None)),
    "gamma must be a number, got '2'": (["harma", "adaptive_triplet"], dict(gamma="2")),
    "gamma must be at least 0 and finite, got -1": (["harma", "adaptive_triplet"], dict(gamma=-1)),
    "gamma must be at least 0 and finite, got inf": (["harma", "adaptive_triplet"], dict(gamma=float("inf"))),
    "t must be above 0 and finite, got 0": (["uniformity"], dict(t=0)),
    "alpha must be at least 1 and finite, got 0.5": (["alignment"], dict(alpha=0.5)),
    "impl must be 'auto', 'fused' or 'reference', got 'fast'": (CHOOSING, dict(impl="fast")),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named(message):
    losses, options = BAD[message]
    for name in losses:
        with pytest.raises(ValueError, match=re.escape(message)):
            LOSSES[name](ONES, ONES, **options)


def test_a_rectangular_batch_needs_both_ids():
    for ids in ({}, dict(image_ids=IDS)):
        with pytest.raises(ValueError, match="image_ids and text_ids are needed for 4 images and 3 texts"):
            rsfast.contrastive_loss(ONES, ONES[:3], SCALE, **ids)


def test_uniformity_needs_two_rows_of_floating_point():
    for bad, message in ((ONES[:1], "2 rows or more, got 1"), (ONES[:0], "empty: 0 rows"), (IDS, "features must be")):
        with pytest.raises(ValueError, match=message):
            rsfast.uniformity_loss(bad)


@pytest.mark.parametrize("loss", (one_way_loss, one_way_sigmoid_loss))
def test_keys_must_be_there(loss):
    for offset, rows in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(
            ValueError, match=re.escape(f"row i + offset for each of {rows} queries, got offset {offset}")
        ):
            loss(torch.ones(rows, 8), ONES, SCALE, offset=offset)
    with pytest.raises(ValueError, match="keys must be 8 wide, as queries, got 9"):
        loss(ONES, torch.ones(4, 9), SCALE)


def test_ids_of_queries_and_keys_come_together():
    for name, other in (("query_ids", "key_ids"), ("key_ids", "query_ids")):
        with pytest.raises(ValueError, match=f"come together, got None for {other}"):
            one_way_loss(ONES, ONES, SCALE, **{name: IDS})
    with pytest.raises(ValueError, match="key_ids must be 4 integers"):
        one_way_loss(ONES[:3], ONES, SCALE, query_ids=IDS[:3], key_ids=IDS[:3])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", CHOOSING)
def test_broken_features_are_found_when_asked(name, value):
    image, text = (x.detach() for x in batch(4, 4))
    broken = "text_features" if name in PAIRED else "features"
    (text if name in PAIRED else image)[2, 5] = value
    CHOOSING[name](image, text)  # by default nobody looks
    with pytest.raises(ValueError, match=f"^{broken} must be finite: 1 of 4 rows are not, the first is 2"):
        CHOOSING[name](image, text, check_finite=True)


def test_checks_do_not_break_a_compiled_graph():
    """The scale that lives on the CPU is looked at outside of graphs only."""
    torch._dynamo.reset()
    compiled = torch.compile(rsfast.contrastive_loss, fullgraph=True, backend="eager")
    image, text = batch(4, 4)
    ids = torch.tensor((1, 1, 2, 3))
    expected = rsfast.contrastive_loss(image, text, SCALE, image_ids=ids, normalize=True)
    assert torch.equal(compiled(image, text, SCALE, image_ids=ids, normalize=True), expected)


@pytest.mark.parametrize("name", CHOOSING)
def test_fused_says_every_reason(name):
    image, text = batch(4, 4, dtype=torch.float64)
    with pytest.raises(
        NotImplementedError, match="the features are torch.float64; the kernels take fp32, fp16 and bf16"
    ):
        CHOOSING[name](image, text, impl="fused")


def test_gradients_of_the_references_numerically():
    """Those whose rows in the contract suite are not wired."""
    image, text, scale, bias = *features(4, 4), number(3.0), number(-1.0)
    labels = torch.tensor((1, 1, 2, 3))
    for loss in (
        lambda i, t, s, b: reference.affiliation_loss(i, t, labels, s) + 0 * b,
        lambda i, t, s, b: reference.alignment_loss(i, t, alpha=1.5) + 0 * b * s,
        lambda i, t, s, b: reference.one_way_sigmoid_loss(i[:2], t, s, b, offset=1),
        lambda i, t, s, b: reference.adaptive_triplet_loss(i, t, gamma=0.5, margin=0.4) + 0 * b * s,
    ):
        assert torch.autograd.gradcheck(loss, (image, text, scale, bias))
