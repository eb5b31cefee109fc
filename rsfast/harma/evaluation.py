"""Features and retrieval metrics of a model on captioned images."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rsfast.harma.config import PRECISIONS
from rsfast.harma.data import CaptionedImages
from rsfast.harma.loading import EvalImages, eval_collate, loader
from rsfast.harma.model import image_settings
from rsfast.harma.retrieval import retrieval_metrics


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        metrics: The numbers of :func:`retrieval_metrics`, those ending in ``_same_words`` included.
        image_features: (N, D) fp32 on the CPU, unit norm.
        text_features: (M, D) likewise.
        text_to_image: (M,) into ``image_features``.
        images: For each row of ``image_features`` its index in the data.
        texts: For each row of ``text_features`` its index in the data.
        broken: Reasons by name of what could not be used; an image went with its captions.
    """

    metrics: dict[str, float]
    image_features: Tensor
    text_features: Tensor
    text_to_image: Tensor
    images: list[int]
    texts: list[int]
    broken: dict[str, str]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer,
    data: CaptionedImages,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    batch_size: int = 128,
    workers: int = 0,
    strict: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Encode ``data`` and measure retrieval.

    Each distinct caption is encoded once, so word-identical captions tie exactly. The model is put into evaluation
    mode for the time being and its training mode is restored.

    Args:
        model: An open_clip model, on ``device``.
        tokenizer: Its tokenizer.
        data: Every image needs a caption.
        device: Where to compute.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast for the encoders.
        batch_size: Images or texts at once.
        workers: Processes that decode images.
        strict: Raise at the first broken image instead of leaving it out.
        progress: Show a bar.

    Raises:
        ValueError: An image is broken and ``strict``, or all of them are.
    """
    device = torch.device(device)
    if strict:
        data.refuse_left_out()
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        autocast = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")
        with autocast:
            images, image_features, broken = _images(model, data, device, batch_size, workers, strict, progress)
            place = {image: row for row, image in enumerate(images)}
            texts = [t for t, image in enumerate(data.text_to_image) if image in place]
            text_features = _texts(model, tokenizer, [data.texts[t] for t in texts], device, batch_size)
    finally:
        for module, mode in training.items():
            module.training = mode
    broken = dict(data.left_out) | broken
    text_to_image = torch.tensor([place[data.text_to_image[t]] for t in texts])
    metrics = retrieval_metrics(
        image_features, text_features, text_to_image.to(device), texts=[data.texts[t] for t in texts]
    )
    return Evaluation(metrics, image_features.cpu(), text_features.cpu(), text_to_image, images, texts, broken)


def _images(model, data, device, batch_size, workers, strict, progress):
    from rsfast.harma.transforms import eval_transform  # torchvision takes its time to import

    transform = eval_transform(**image_settings(model))
    batches = loader(
        EvalImages(data, transform), workers=workers, pin_memory=device.type == "cuda", batch_size=batch_size,
        collate_fn=eval_collate,
    )  # fmt: skip
    used, features, broken = [], [], {}
    for indices, images, problems in tqdm(batches, "images", leave=False, disable=not progress):
        broken |= {data.name(index): reason for index, reason in problems.items()}
        if broken and strict:
            raise ValueError("an image cannot be used: {}: {}".format(*next(iter(broken.items()))))
        if indices:
            used += indices
            encoded = model.encode_image(images.to(device, non_blocking=True))
            features.append(F.normalize(encoded.float(), dim=-1))
    if not used:
        raise ValueError(
            "none of {}'s images can be used, e.g. {}: {}".format(data.source, *next(iter(broken.items())))
        )
    return used, torch.cat(features), broken


def _texts(model, tokenizer, texts: list[str], device, batch_size) -> Tensor:
    number: dict[str, int] = {}
    rows = torch.tensor([number.setdefault(text, len(number)) for text in texts], device=device)
    distinct = list(number)
    features = []
    for start in range(0, len(distinct), batch_size):
        tokens = tokenizer(distinct[start : start + batch_size]).to(device)
        features.append(F.normalize(model.encode_text(tokens).float(), dim=-1))
    return torch.cat(features)[rows]
