"""Recall at 1, 5 and 10 in both directions, exact and in bounded memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # scores held at once by default: 128 MiB in fp64


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (M, D)
    text_to_image: Tensor,  # (M,)
    *,
    texts: Sequence[str] | None = None,
    block: int | None = None,
) -> dict[str, float]:
    """Share of queries, in percent, with a right answer among the first 1, 5 and 10.

    ``txt_r1 txt_r5 txt_r10``: an image is the query, and the best placed of its captions counts. ``img_r1 img_r5
    img_r10``: a caption is the query. ``r_mean``: the mean of the six.

    Ties: equal scores are ordered by index, lowest first, as a stable sort would. So identical features earn what
    guessing earns: counting ties as hits would give a collapsed model 100 %, counting them as misses would punish
    the captions that a data set repeats word for word.

    Upstream: HarMA ``Retrieval.py::itm_eval``. Differs from upstream: its ties fall as numpy's unstable sort leaves
    them, and it rounds to two decimals.

    Args:
        image_features: Any floating dtype; used as they are, never normalised.
        text_features: Same D and device.
        text_to_image: Integers, the image of each text. Every image needs one text or more.
        texts: The captions, to add the same seven numbers under keys ending in ``_same_words``, for which every
            caption that equals one of the image's own word for word is a hit too.
        block: Queries scored at once. The result does not depend on it.

    Raises:
        ValueError: A shape, dtype, device or index does not fit, a feature is not finite, or an image has no text.

    Precision: inner products in fp64, rounded once to fp32 before they are compared (not rounded for fp64 features),
    so that equal features tie whatever the block. Deterministic: yes. Cost: 4 N M D FLOPs; no N x M matrix, no sort.

    Example:
        >>> import torch, rsfast.harma
        >>> eye = torch.eye(3)
        >>> rsfast.harma.retrieval_metrics(eye, eye, torch.arange(3))["r_mean"]
        100.0
    """
    _check(image_features, text_features, text_to_image, texts, block)
    owner = text_to_image.to(image_features.device, torch.long)
    images, captions = image_features, text_features

    def own_texts(start, stop):
        return torch.arange(start, stop, device=owner.device)[:, None] == owner[None, :]

    def own_image(start, stop):
        return owner[start:stop, None] == torch.arange(len(images), device=owner.device)[None, :]

    result = _recalls(_ranks(images, captions, own_texts, block), _ranks(captions, images, own_image, block), "")
    if texts is None:
        return result
    number: dict[str, int] = {}
    words = torch.tensor([number.setdefault(text, len(number)) for text in texts], device=owner.device)

    def texts_of_same_words(start, stop):
        here = (owner >= start) & (owner < stop)
        has = torch.zeros(stop - start, len(number), dtype=torch.bool, device=owner.device)
        has[owner[here] - start, words[here]] = True
        return has[:, words]

    def images_of_same_words(start, stop):
        asked, which = words[start:stop].unique(return_inverse=True)
        place = torch.searchsorted(asked, words).clamp(max=len(asked) - 1)
        here = asked[place] == words
        has = torch.zeros(len(asked), len(images), dtype=torch.bool, device=owner.device)
        has[place[here], owner[here]] = True
        return has[which]

    return result | _recalls(
        _ranks(images, captions, texts_of_same_words, block),
        _ranks(captions, images, images_of_same_words, block),
        "_same_words",
    )


def scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Inner products, from fp64 rounded once to fp32; fp64 stays as it is."""
    product = queries.double() @ candidates.double().mT
    return product if queries.dtype == torch.float64 else product.float()


def _ranks(queries: Tensor, candidates: Tensor, positives: Callable[[int, int], Tensor], block: int | None) -> Tensor:
    """For each query the place, from 0, of its best right candidate. ``positives(start, stop)``: (stop - start, M)."""
    block = block or max(1, BLOCK_ELEMENTS // len(candidates))
    places = torch.arange(len(candidates), device=queries.device)
    ranks = []
    for start in range(0, len(queries), block):
        stop = min(start + block, len(queries))
        score, right = scores(queries[start:stop], candidates), positives(start, stop)
        best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        first = places.where(right & (score == best), len(candidates)).amin(1, keepdim=True)
        # no right candidate scores above the best one, and none that ties with it has a lower index
        ranks.append(((score > best) | ((score == best) & (places < first))).sum(1))
    return torch.cat(ranks)


def _recalls(txt: Tensor, img: Tensor, suffix: str) -> dict[str, float]:
    """``txt``: ranks with an image as the query. ``img``: with a text as the query."""
    result = {
        f"{name}_r{k}": 100 * (ranks < k).sum().item() / len(ranks)
        for name, ranks in (("txt", txt), ("img", img))
        for k in (1, 5, 10)
    }
    result["r_mean"] = sum(result.values()) / len(result)
    return {key + suffix: value for key, value in result.items()}


def _check(image_features, text_features, text_to_image, texts, block):
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.ndim != 2 or not features.is_floating_point() or not len(features):
            got = f"{features.dtype} of shape {tuple(features.shape)}"
            raise ValueError(f"{name} must be floating point (N, D) with N > 0, got {got}")
        if not features.isfinite().all():
            raise ValueError(f"{name} must be finite, {int((~features.isfinite()).any(1).sum())} of its rows are not")
    for what in ("dtype", "device"):
        if getattr(image_features, what) != getattr(text_features, what):
            raise ValueError(
                f"text_features must have {what} {getattr(image_features, what)}, as image_features, "
                f"got {getattr(text_features, what)}"
            )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"text_features must be {image_features.shape[1]} wide, as image_features, got {text_features.shape[1]}"
        )
    if (
        text_to_image.shape != text_features.shape[:1]
        or text_to_image.is_floating_point()
        or text_to_image.dtype == torch.bool
    ):
        raise ValueError(
            f"text_to_image must be {len(text_features)} integers, one a text, "
            f"got {text_to_image.dtype} of shape {tuple(text_to_image.shape)}"
        )
    low, high = text_to_image.min().item(), text_to_image.max().item()
    if low < 0 or high >= len(image_features):
        raise ValueError(f"text_to_image must be from 0 to {len(image_features) - 1}, got {low} to {high}")
    alone = torch.bincount(text_to_image.long(), minlength=len(image_features)) == 0
    if alone.any():
        raise ValueError(
            f"text_to_image leaves {int(alone.sum())} images without a text, the first is {int(alone.int().argmax())}; "
            "leave them out of image_features"
        )
    if texts is not None and len(texts) != len(text_features):
        raise ValueError(f"texts must be {len(text_features)} captions, one a row of text_features, got {len(texts)}")
    if block is not None and block < 1:
        raise ValueError(f"block must be 1 or more, got {block}")
