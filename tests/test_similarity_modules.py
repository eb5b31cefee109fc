"""The losses as modules: open_clip's, in one process and in two, and what a training loop gets from them."""

import functools
import inspect
import itertools

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss

import rsfast
from tests.pairs import features, number, same_gradients, same_to_rounding

WORLD, ROWS = 2, 3
IDS = torch.tensor((5, 5, 1, 2, 1, 5))  # of all processes: equal ones in one of them, and in both
BOTH = (False, True)


@pytest.mark.parametrize("n", (2, 7))
def test_contrastive_loss_is_open_clips(n):
    leaves = (*features(n, n), number(14.0))
    ours, theirs = (kind()(*leaves, output_dict=True) for kind in (rsfast.ContrastiveLoss, open_clip.ClipLoss))
    assert ours.keys() == theirs.keys() and same_gradients(*ours.values(), *theirs.values(), leaves)
    assert torch.equal(rsfast.ContrastiveLoss()(*leaves), *ours.values())


def test_a_bias_changes_nothing_but_is_used():
    leaves = (*features(4, 4), number(14.0), number(-10.0))
    ours, theirs = (kind()(*leaves) for kind in (rsfast.ContrastiveLoss, open_clip.ClipLoss))
    assert torch.equal(ours, rsfast.contrastive_loss(*leaves[:3])) and same_to_rounding(ours, theirs, factor=640)
    assert torch.autograd.grad(ours, leaves[3])[0] == 0


@pytest.mark.parametrize("n", (2, 7))
def test_sigmoid_loss_is_open_clips(n):
    leaves = (*features(n, n), number(10.0), number(-10.0))
    ours, theirs = (kind()(*leaves, output_dict=True) for kind in (rsfast.SigmoidLoss, SigLipLoss))
    assert ours.keys() == theirs.keys() and same_gradients(*ours.values(), *theirs.values(), leaves)
    assert torch.equal(rsfast.SigmoidLoss()(*leaves), *ours.values())


@pytest.mark.parametrize(
    "ours, theirs",
    ((rsfast.ContrastiveLoss, open_clip.ClipLoss), (rsfast.SigmoidLoss, SigLipLoss)),
)
def test_arguments_are_open_clips(ours, theirs):
    """All of them, in their order, with their defaults; ours come after them."""
    for one, two in ((ours.__init__, theirs.__init__), (ours.forward, theirs.forward)):
        mine, given = (inspect.signature(f).parameters for f in (one, two))
        assert list(mine)[: len(given)] == list(given)
        assert all(mine[name].kind == p.kind for name, p in given.items())
        assert all(mine[name].default == p.default for name, p in given.items() if p.default is not p.empty)
        assert all(p.kind == p.KEYWORD_ONLY for name, p in mine.items() if name not in given)


def shares(rank):
    """Rows of one process, as leaves, and the numbers."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    image, text = (x.detach()[rows].requires_grad_() for x in features(WORLD * ROWS, WORLD * ROWS))
    return image, text, number(14.0), number(-9.0)


def in_a_process(rank, rendezvous):
    """Everything that two processes are needed for; an assertion that fails here fails the test."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    world = dict(rank=rank, world_size=WORLD)
    image, text, scale, bias = shares(rank)
    rows, whole = slice(rank * ROWS, (rank + 1) * ROWS), (*features(*[WORLD * ROWS] * 2), number(14.0))
    for local_loss, gather_with_grad in itertools.product(BOTH, BOTH):
        how = dict(local_loss=local_loss, gather_with_grad=gather_with_grad, **world)
        ours, theirs = (kind(**how)(image, text, scale) for kind in (rsfast.ContrastiveLoss, open_clip.ClipLoss))
        assert same_gradients(ours, theirs, (image, text, scale)), how

        loss = rsfast.ContrastiveLoss(**how)(image, text, scale, image_ids=IDS[rows])
        everyone = loss.detach().clone()
        torch.distributed.all_reduce(everyone)
        alone = rsfast.contrastive_loss(*whole, image_ids=IDS)
        assert same_to_rounding(everyone / WORLD, alone.detach()), how  # and a loss of all is everyone's loss
        assert local_loss or same_to_rounding(loss.detach(), alone.detach()), how
        if gather_with_grad:  # summed over the losses of all processes, each of which counts the whole, or its part
            grads = torch.autograd.grad(loss, (image, text))
            for ours, theirs in zip(grads, torch.autograd.grad(alone, whole[:2]), strict=True):
                assert same_to_rounding(ours, WORLD * theirs[rows]), how
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        how = dict(dist_impl=dist_impl, **world)
        ours, theirs = (kind(**how)(image, text, scale, bias) for kind in (rsfast.SigmoidLoss, SigLipLoss))
        assert same_gradients(ours, theirs, (image, text, scale, bias)), how
    with torch.no_grad():
        ours, theirs = (kind(**world)(image, text, scale, bias) for kind in (rsfast.SigmoidLoss, SigLipLoss))
        assert same_to_rounding(ours, theirs)
    torch.distributed.destroy_process_group()


def test_two_processes_are_as_in_open_clip(tmp_path):
    torch.multiprocessing.spawn(in_a_process, args=(tmp_path / "rendezvous",), nprocs=WORLD)


@pytest.mark.parametrize("options", ({}, dict(margin=0.4, negatives="hardest", mask_same_id=True, normalize=True)))
def test_triplet_modules_are_the_functions(options):
    image, text, ids = *features(6, 6), dict(image_ids=IDS, text_ids=IDS.flip(0))
    for module, function, more in (
        (rsfast.TripletLoss, rsfast.triplet_loss, {}),
        (rsfast.AdaptiveTripletLoss, rsfast.adaptive_triplet_loss, dict(gamma=1.0)),
    ):
        assert torch.equal(
            module(**options, **more)(image, text, **ids), function(image, text, **ids, **options, **more)
        )


def test_options_of_the_contrastive_module_are_the_functions():
    image, text = (3 * x for x in features(6, 6))
    options, ids = (
        dict(label_smoothing=0.1, normalize=True, check_finite=True),
        dict(image_ids=IDS, text_ids=IDS.flip(0)),
    )
    ours = rsfast.ContrastiveLoss(**options)(image, text, number(5.0), **ids)
    assert torch.equal(ours, rsfast.contrastive_loss(image, text, number(5.0), **options, **ids))


@pytest.mark.parametrize("weights", ((1.0, 1.0), (0.5, 3.0)))
def test_harma_module_weighs_the_two_losses(weights):
    leaves = (*features(6, 6), number(14.0))
    contrastive = weights[0] * rsfast.contrastive_loss(*leaves, image_ids=IDS)
    triplet = weights[1] * rsfast.adaptive_triplet_loss(*leaves[:2], margin=0.3, gamma=1.0)
    module = rsfast.HarMALoss(margin=0.3, gamma=1.0, contrastive_weight=weights[0], triplet_weight=weights[1])
    parts = module(*leaves, image_ids=IDS, output_dict=True)
    assert parts == {"contrastive_loss": contrastive, "adaptive_triplet_loss": triplet}
    assert same_gradients(module(*leaves, image_ids=IDS), contrastive + triplet, leaves)


def test_modules_are_told_the_implementation():
    leaves = (*features(4, 4), number(14.0))
    for kind in (rsfast.ContrastiveLoss, rsfast.SigmoidLoss, rsfast.HarMALoss):
        with pytest.raises(NotImplementedError, match="the fused kernel cannot run"):  # of float64
            kind(impl="fused")(*leaves)
    for kind in (rsfast.TripletLoss, rsfast.AdaptiveTripletLoss):
        with pytest.raises(NotImplementedError, match="the fused kernel cannot run"):
            kind(impl="fused")(*leaves[:2])


def test_bad_arguments_are_named():
    for kind in (rsfast.ContrastiveLoss, rsfast.SigmoidLoss):
        with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1 = 1, got 2"):
            kind(rank=2, world_size=2)
    with pytest.raises(NotImplementedError, match="use_horovod must be False"):
        rsfast.ContrastiveLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl must be 'bidir', .* or None, got 'ring'"):
        rsfast.SigmoidLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="torch.distributed must be initialised for a world_size of 2"):
        rsfast.ContrastiveLoss(world_size=2)(*features(4, 4), number(1.0))
    with pytest.raises(ValueError, match="image_ids are needed where text_ids are given"):
        rsfast.ContrastiveLoss(world_size=2)(*features(4, 4), number(1.0), text_ids=torch.arange(4))
    for kind in (rsfast.TripletLoss, functools.partial(rsfast.AdaptiveTripletLoss, gamma=1.0)):
        with pytest.raises(ValueError, match="negatives must be 'all' or 'hardest', got 'some'"):
            kind(negatives="some")(*features(4, 4))
