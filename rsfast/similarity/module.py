"""The in-batch losses as modules; those of open_clip's arguments gather the features of all processes."""

import torch
from torch import Tensor, nn

from rsfast._dispatch import Impl
from rsfast.similarity import functional
from rsfast.similarity.functional import checks


def _gathered(rows: Tensor, rank: int, world_size: int, *, with_grad: bool = False, own_grad: bool = False) -> Tensor:
    """Rows of all processes in the order of their ranks, as many from each.

    Gradients reach no rows, this process's (``own_grad``), or everyone's, summed over the processes (``with_grad``).
    """
    from torch import distributed

    if not distributed.is_initialized():
        raise ValueError(f"torch.distributed must be initialised for a world_size of {world_size}")
    rows = rows.contiguous()
    if with_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(rows))
    everyone = [torch.empty_like(rows) for _ in range(world_size)]
    distributed.all_gather(everyone, rows.detach())
    if own_grad:
        everyone[rank] = rows
    return torch.cat(everyone)


class _Loss(nn.Module):
    """What all losses are told once: how to prepare the features, and the implementation."""

    def __init__(self, *, normalize: bool, check_finite: bool, impl: Impl):
        super().__init__()
        self.options = dict(normalize=normalize, check_finite=check_finite, impl=impl)


class _Gathering(_Loss):
    """A loss over the rows of all processes."""

    def __init__(self, rank: int, world_size: int, **options):
        super().__init__(**options)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.rank, self.world_size = rank, world_size


class ContrastiveLoss(_Gathering):
    """Drop-in for ``open_clip.ClipLoss``: the same arguments, values and gradients, plus ids.

    Module form of :func:`rsfast.contrastive_loss`. Several processes gather their features; each must have as many
    rows. Then, as in open_clip:

    ===================  ==============================  ==================================================
    ``local_loss``       ``gather_with_grad=False``      ``gather_with_grad=True``
    ===================  ==============================  ==================================================
    False: loss of all   gradient to the own rows only   to everyone's, summed: ``world_size`` times the
                                                         gradient of the loss
    True: own rows       to the own rows as queries,     the gradient of the summed local losses, so that
    against all          none through the gathered       averaging over processes gives the loss of all
    ===================  ==============================  ==================================================

    Args:
        local_loss: Each process computes only its own rows' part of the loss.
        gather_with_grad: Gradients flow through the gathering.
        cache_labels: Accepted and without effect: there are no labels to cache.
        rank: Number of this process.
        world_size: Number of processes; above 1 ``torch.distributed`` must be initialised.
        use_horovod: Only False.
        label_smoothing: As in :func:`rsfast.contrastive_loss`.
        normalize: As in :func:`rsfast.contrastive_loss`.
        check_finite: As in :func:`rsfast.contrastive_loss`; looks at the features of all processes.
        impl: As in :func:`rsfast.contrastive_loss`.

    Raises:
        ValueError: ``rank`` is outside the world.
        NotImplementedError: ``use_horovod=True``.

    Source: open_clip ``ClipLoss``.

    Example:
        >>> import torch, rsfast
        >>> loss = rsfast.ContrastiveLoss()
        >>> loss(torch.eye(4), torch.eye(4), torch.tensor(100.0), output_dict=True)["contrastive_loss"].shape
        torch.Size([])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        normalize: bool = False,
        check_finite: bool = False,
        impl: Impl = "auto",
    ):
        super().__init__(rank, world_size, normalize=normalize, check_finite=check_finite, impl=impl)
        if use_horovod:
            raise NotImplementedError("use_horovod must be False: features are gathered with torch.distributed")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor,  # ()
        logit_bias: Tensor | None = None,  # ()
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,  # (N,)
        text_ids: Tensor | None = None,  # (N,)
    ) -> Tensor | dict[str, Tensor]:  # ()
        """The loss, or ``{"contrastive_loss": loss}``; ids are this process's, as the features are.

        ``logit_bias`` changes nothing, for softmax does not see it; its gradient is zero.
        """
        options = dict(label_smoothing=self.label_smoothing, **self.options)
        if self.world_size == 1:
            loss = functional.contrastive_loss(
                image_features, text_features, logit_scale, image_ids=image_ids, text_ids=text_ids, **options
            )
        else:
            loss = self._of_all(image_features, text_features, logit_scale, image_ids, text_ids, options)
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # so that its gradient is zero, not missing
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_all(self, image_features, text_features, logit_scale, image_ids, text_ids, options):
        def gathered(x, **grad):
            return None if x is None else _gathered(x, self.rank, self.world_size, **grad)

        checks.check_ids_given(image_ids, text_ids)
        grad = dict(with_grad=self.gather_with_grad, own_grad=not self.local_loss)
        all_images, all_texts = gathered(image_features, **grad), gathered(text_features, **grad)
        all_image_ids, all_text_ids = gathered(image_ids), gathered(text_ids)
        if not self.local_loss:
            return functional.contrastive_loss(
                all_images, all_texts, logit_scale, image_ids=all_image_ids, text_ids=all_text_ids, **options
            )
        if text_ids is None:
            text_ids, all_text_ids = image_ids, all_image_ids
        options["offset"] = self.rank * len(image_features)
        to_text = functional.one_way_loss(
            image_features, all_texts, logit_scale, query_ids=image_ids, key_ids=all_text_ids, **options
        )
        to_image = functional.one_way_loss(
            text_features, all_images, logit_scale, query_ids=text_ids, key_ids=all_image_ids, **options
        )
        return (to_text + to_image) / 2


class SigmoidLoss(_Gathering):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same arguments, values and gradients.

    Module form of :func:`rsfast.sigmoid_loss`. With several processes it is the loss of this process's images against
    everyone's texts, which are gathered, and every process must have as many rows; gradients reach everyone's texts.

    Args:
        cache_labels: Accepted and without effect: there are no labels to cache.
        rank: Number of this process.
        world_size: Number of processes; above 1 ``torch.distributed`` must be initialised.
        dist_impl: ``bidir``, ``shift``, ``reduce``, ``gather`` or None. All are the same numbers; here texts are
            always gathered.
        normalize: As in :func:`rsfast.sigmoid_loss`.
        check_finite: As in :func:`rsfast.sigmoid_loss`; looks at the texts of all processes.
        impl: As in :func:`rsfast.sigmoid_loss`.

    Raises:
        ValueError: ``rank`` is outside the world, or ``dist_impl`` is none of these.

    Source: open_clip ``SigLipLoss``.

    Example:
        >>> import torch, rsfast
        >>> loss = rsfast.SigmoidLoss()
        >>> loss(torch.eye(4), torch.eye(4), torch.tensor(40.0), torch.tensor(-20.0)).item() < 1e-7
        True
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        normalize: bool = False,
        check_finite: bool = False,
        impl: Impl = "auto",
    ):
        super().__init__(rank, world_size, normalize=normalize, check_finite=check_finite, impl=impl)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be 'bidir', 'shift', 'reduce', 'gather' or None, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor,  # ()
        logit_bias: Tensor | None = None,  # ()
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # ()
        """The loss, or ``{"contrastive_loss": loss}``, as open_clip calls it."""
        numbers = (logit_scale, logit_bias)
        if self.world_size == 1:
            loss = functional.sigmoid_loss(image_features, text_features, *numbers, **self.options)
        else:
            texts = _gathered(text_features, self.rank, self.world_size, with_grad=True)
            offset = self.rank * len(image_features)
            loss = functional.one_way_sigmoid_loss(image_features, texts, *numbers, offset=offset, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


class TripletLoss(_Loss):
    """Module form of :func:`rsfast.triplet_loss`, whose options it takes.

    Example:
        >>> import torch, rsfast
        >>> rsfast.TripletLoss(negatives="hardest")(torch.eye(4), torch.eye(4)).item()
        0.0
    """

    def __init__(
        self,
        *,
        margin: float = 0.2,
        negatives: functional.Negatives = "all",
        mask_same_id: bool = False,
        normalize: bool = False,
        check_finite: bool = False,
        impl: Impl = "auto",
    ):
        super().__init__(normalize=normalize, check_finite=check_finite, impl=impl)
        self.margin, self.negatives, self.mask_same_id = margin, negatives, mask_same_id

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        *,
        image_ids: Tensor | None = None,  # (N,)
        text_ids: Tensor | None = None,  # (N,)
    ) -> Tensor:  # ()
        return functional.triplet_loss(
            image_features, text_features, margin=self.margin, negatives=self.negatives,
            image_ids=image_ids, text_ids=text_ids, mask_same_id=self.mask_same_id, **self.options,
        )  # fmt: skip


class AdaptiveTripletLoss(_Loss):
    """Module form of :func:`rsfast.adaptive_triplet_loss`, whose options it takes.

    Example:
        >>> import torch, rsfast
        >>> rsfast.AdaptiveTripletLoss(gamma=1.0)(torch.eye(4), torch.eye(4)).item()
        0.0
    """

    def __init__(
        self,
        *,
        margin: float = 0.2,
        gamma: float = 2.0,
        negatives: functional.Negatives = "all",
        mask_same_id: bool = False,
        normalize: bool = False,
        check_finite: bool = False,
        impl: Impl = "auto",
    ):
        super().__init__(normalize=normalize, check_finite=check_finite, impl=impl)
        self.margin, self.gamma, self.negatives, self.mask_same_id = margin, gamma, negatives, mask_same_id

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        *,
        image_ids: Tensor | None = None,  # (N,)
        text_ids: Tensor | None = None,  # (N,)
    ) -> Tensor:  # ()
        return functional.adaptive_triplet_loss(
            image_features, text_features, margin=self.margin, gamma=self.gamma, negatives=self.negatives,
            image_ids=image_ids, text_ids=text_ids, mask_same_id=self.mask_same_id, **self.options,
        )  # fmt: skip


class HarMALoss(_Loss):
    """HarMA's objective: the weighted sum of the two losses of :func:`rsfast.harma_loss`.

    Features of several processes are gathered by the caller.

    Args:
        margin: As in :func:`rsfast.harma_loss`.
        gamma: As in :func:`rsfast.harma_loss`.
        contrastive_weight: What the contrastive loss is multiplied by.
        triplet_weight: What the adaptive triplet loss is multiplied by.
        normalize: As in :func:`rsfast.harma_loss`.
        check_finite: As in :func:`rsfast.harma_loss`.
        impl: As in :func:`rsfast.harma_loss`.

    Example:
        >>> import torch, rsfast
        >>> loss = rsfast.HarMALoss()
        >>> sorted(loss(torch.eye(4), torch.eye(4), torch.tensor(14.0), output_dict=True))
        ['adaptive_triplet_loss', 'contrastive_loss']
    """

    def __init__(
        self,
        *,
        margin: float = 0.2,
        gamma: float = 2.0,
        contrastive_weight: float = 1.0,
        triplet_weight: float = 1.0,
        normalize: bool = False,
        check_finite: bool = False,
        impl: Impl = "auto",
    ):
        super().__init__(normalize=normalize, check_finite=check_finite, impl=impl)
        self.margin, self.gamma = margin, gamma
        self.contrastive_weight, self.triplet_weight = contrastive_weight, triplet_weight

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor,  # ()
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,  # (N,)
    ) -> Tensor | dict[str, Tensor]:  # ()
        """The sum, or its two weighted parts by name, as a training loop of open_clip's sums them."""
        contrastive, triplet = functional.harma_loss(
            image_features, text_features, logit_scale,
            image_ids=image_ids, margin=self.margin, gamma=self.gamma, **self.options,
        )  # fmt: skip
        parts = {
            "contrastive_loss": self.contrastive_weight * contrastive,
            "adaptive_triplet_loss": self.triplet_weight * triplet,
        }
        return parts if output_dict else sum(parts.values())
