"""What broke once: inputs that are odd in their memory, their size or the way they are differentiated."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F

import rsfast
from rsfast import _dispatch
from rsfast.similarity.functional import one_way_loss

pytest.importorskip("triton")
N, D = 20, 8
LOSSES = {
    "contrastive": lambda v, t, **options: rsfast.contrastive_loss(
        v, t, torch.tensor(14.0), **ids(v.device), **options
    ),
    "harma": lambda v, t, **options: sum(rsfast.harma_loss(v, t, torch.tensor(14.0), **options)),
    "hardest": lambda v, t, **options: rsfast.triplet_loss(v, t, negatives="hardest", **options),
    "sigmoid": lambda v, t, **options: rsfast.sigmoid_loss(v, t, torch.tensor(9.0), torch.tensor(-9.0), **options),
    "triplet": lambda v, t, **options: rsfast.triplet_loss(v, t, mask_same_id=True, **ids(v.device), **options),
    "uniformity": lambda v, t, **options: rsfast.uniformity_loss(v, **options) + 0 * t.sum(),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def ids(device):
    """Two tensors: then a small batch takes the kernels of a large one."""
    return dict(image_ids=torch.arange(N, device=device), text_ids=torch.arange(N, device=device))


def drawn(dtype, near=0.0, device="cpu"):
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(N, D, generator=g) for _ in "ab")
    return [F.normalize(x, dim=1).to(device, dtype).requires_grad_() for x in (image, text + near * image)]


@each_loss
def test_features_that_start_anywhere_in_memory(name, device):
    """Descriptors ask for multiples of 16 bytes."""
    image, text = (x.detach().to(device) for x in drawn(torch.bfloat16))
    odd = torch.cat([image.new_zeros(1), image.flatten()])[1:].view(N, D)
    assert odd.data_ptr() % 16
    losses = [LOSSES[name](x, text, impl="fused") for x in (odd, image)]
    if device == "cpu":
        assert torch.equal(*losses)
    torch.testing.assert_close(*losses)  # without descriptors a GPU may add in another order


def test_a_single_row_of_any_stride(device):
    """It is contiguous to PyTorch; a descriptor looks at the stride none the less."""
    image, text = (x.detach().to(device) for x in drawn(torch.bfloat16))
    column = text[0].clone()[:, None]
    assert column.T.is_contiguous() and column.T.stride() == (1, 1)
    numbers = dict(image_ids=torch.arange(N, device=device), text_ids=torch.tensor([3], device=device), impl="fused")
    scale = torch.tensor(14.0)
    assert torch.equal(*(rsfast.contrastive_loss(image, one, scale, **numbers) for one in (column.T, text[:1])))


def test_shapes_alone():
    image, text = (x.detach().to("meta") for x in drawn(torch.float32))
    assert rsfast.contrastive_loss(image, text, torch.tensor(14.0)).shape == ()


@pytest.mark.parametrize("size", (1, 2**-10))
def test_an_upstream_gradient_beyond_fp16(size, device):
    """As a gradient scaler's first one is, 2^16; small features have gradients that are lost in fp16 but for it."""
    image, text = ((size * x.detach()).requires_grad_() for x in drawn(torch.float16, 9, device))
    ours, theirs = (
        torch.autograd.grad(LOSSES["sigmoid"](image, text, impl=impl), image, torch.tensor(2.0**16, device=device))[
            0
        ].float()
        for impl in ("fused", "reference")
    )
    assert 1 < theirs.abs().max() < torch.inf
    assert (ours - theirs).norm() <= 2 * torch.finfo(torch.float16).eps * theirs.norm()


def test_gradients_that_come_with_the_loss_do_not_feel_autocast(device):
    image, text = drawn(torch.bfloat16, device=device)
    outside = LOSSES["sigmoid"](image, text, impl="fused")
    with torch.autocast(device, torch.bfloat16):
        inside = LOSSES["sigmoid"](image, text, impl="fused")
    assert torch.equal(*(torch.autograd.grad(loss, image)[0] for loss in (outside, inside)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_way_at_a_temperature_that_overflows(dtype, device):
    """The keys' own exponentials count for nothing; they are not infinite times nothing."""
    image, text = drawn(dtype, device=device)
    scale = torch.tensor(1000.0, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(one_way_loss(image, text, scale, impl=impl), (image, text, scale))
        for impl in ("fused", "reference")
    )
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).norm() <= 4 * torch.finfo(torch.bfloat16).eps * two.norm()


@pytest.mark.parametrize("scale", (300.0, 330.0, 345.0, 1000.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_gradients_of_a_loss_next_to_nothing(dtype, scale, device):
    """Of 10^-30 and less: they may end at 0, but not at infinity."""
    image = torch.eye(N, D + 16).to(device, dtype)
    image[0] *= 2  # too long for the others: they take the kernels with maxima
    image, text = image.requires_grad_(), (image / 4).requires_grad_()
    loss = one_way_loss(image, text, torch.tensor(scale), impl="fused")
    assert 0 <= loss < 1e-29
    for steep in (1.0, 1e-10):
        grads = torch.autograd.grad(loss, (image, text), torch.tensor(steep, device=device), retain_graph=True)
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", LOSSES)
def test_infinity_is_no_number_of_ours(name, device):
    for dtype, sign in itertools.product((torch.float32, torch.bfloat16), (1, -1)):
        image, text = (x.detach() for x in drawn(dtype, device=device))
        image[3, 5] = sign * torch.inf
        assert not LOSSES[name](image, text, impl="fused").isfinite()


HIDES_NOTHING = LOSSES | {
    f"{size} triplet, gamma {gamma}": lambda v, t, gamma=gamma, same=same, **options: rsfast.adaptive_triplet_loss(
        v, t, negatives="all", gamma=gamma, **(ids(v.device) | dict(mask_same_id=True) if same else {}), **options
    )
    for size, same in (("small", False), ("large", True))
    for gamma in (0.5, 1.0, 2.0)
}


@pytest.mark.parametrize("name", HIDES_NOTHING)
def test_nan_is_not_hidden(name, device):
    """A maximum of NaN and a number is the number, on a GPU."""
    for dtype in (torch.float32, torch.bfloat16):
        image, text = (x.detach() for x in drawn(dtype, device=device))
        image[3, 5] = torch.nan
        loss = HIDES_NOTHING[name](image.requires_grad_(), text, impl="fused")
        (grad,) = torch.autograd.grad(loss, image)
        assert loss.isnan() and (grad[3].isnan().any() or name in ("triplet", "hardest"))  # NaN is no violation


@each_loss
def test_what_has_no_derivative_says_so(name, device):
    image, text = drawn(torch.float32, device=device)
    (grad,) = torch.autograd.grad(LOSSES[name](image, text, impl="fused"), image, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: take impl='reference'"):
        grad.norm().backward()
    image, text = image.detach(), text.detach()
    refused = pytest.raises(NotImplementedError, match="no forward-mode derivative: take impl='reference'")
    with refused, torch.autograd.forward_ad.dual_level():
        LOSSES[name](torch.autograd.forward_ad.make_dual(image, text), text, impl="fused")
    with pytest.raises(NotImplementedError, match="torch.func is active"):
        torch.func.jvp(lambda v: LOSSES[name](v, text, impl="fused"), (image,), (text,))
    with pytest.raises(NotImplementedError, match="torch.func is active"):
        torch.func.grad(lambda v: LOSSES[name](v, text, impl="fused"))(image)


def test_launches_are_on_the_tensors_gpu(monkeypatch):
    """Whichever one is current."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda i: current.append(i) or current[-2])
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda i: current.append(i) or current[-2])
    far = types.SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    assert _dispatch._where_it_lives(lambda *args: (current[-1], *args))(far, 5) == (1, far, 5)
    assert current == [0, 1, 0]


@pytest.mark.parametrize("sm, reasons", ((75, 1), (80, 0), (120, 0)))
def test_gpus_that_the_kernels_are_not_made_for(sm, reasons, monkeypatch):
    """Shared memory and registers of a T4 do not hold the tiles, and it has no bf16."""
    monkeypatch.setattr(_dispatch, "capability", lambda device: sm)
    why_not = _dispatch.why_not_triton(types.SimpleNamespace(is_cuda=True, device=torch.device("cuda")))
    assert why_not == ["the GPU has compute capability 7.5, and the kernels need 8.0 or newer"] * reasons


def test_the_same_ids_twice_are_ids_once(device):
    """One tensor for both sides: the kernels that keep the diagonal apart serve it."""
    image, text = drawn(torch.float32, device=device)
    one = ids(device)["image_ids"] // 2
    losses = [rsfast.contrastive_loss(image, text, torch.tensor(14.0), image_ids=one, text_ids=two, impl="fused")
              for two in (None, one)]  # fmt: skip
    assert torch.equal(*losses)


def test_outputs_share_no_memory(device):
    kernels = pytest.importorskip("rsfast.similarity.kernels")
    image, text = (x.detach() for x in drawn(torch.float32, device=device))
    with torch.no_grad():
        _, dimage, dtext, *_ = kernels._pairwise_fwd(
            image,
            text,
            torch.tensor(1.0, device=device),
            None,
            None,
            None,
            False,
            0.0,
            0.0,
            1.0,
            0,
            False,
            False,
            False,
        )
    assert dimage is not dtext and not torch._C._is_alias_of(dimage, dtext)


def test_graphs_of_any_shape_and_option():
    """Where PyTorch traces with sizes and numbers unknown, as it does once they have changed."""
    torch._dynamo.reset()
    compiled = torch.compile(rsfast.adaptive_triplet_loss, fullgraph=True, backend="eager", dynamic=True)
    image, text = drawn(torch.float32)
    for rows, margin, gamma in ((N, 0.2, 2.0), (N - 3, 0.3, 1.5)):
        options = dict(margin=margin, gamma=gamma)
        expected = rsfast.adaptive_triplet_loss(image[:rows], text[:rows], **options)
        assert torch.equal(compiled(image[:rows], text[:rows], **options), expected)
