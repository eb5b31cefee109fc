"""HarMA end to end: data, training, evaluation, retrieval, pictures.

From files::

    config = TrainConfig(train_data="train.json", val_data="val.json", images="images.zip", model="ViT-B-32",
                         pretrained="laion2b_s34b_b79k", out="run")
    result = train(config)                       # the best epoch on val is in run/
    best = load_run("run")                       # best.model, best.tokenizer
    found = evaluate(best.model, best.tokenizer, load_captions("test.json", "images.zip"))
    found.metrics["r_mean"]

From memory: ``CaptionedImages(pil_images, captions, text_to_image)`` stands wherever a caption file does, and a model
made elsewhere goes in by ``train(config, train_data=..., val_data=..., model=..., tokenizer=...)`` with
``TrainConfig(model=<its open_clip config, a dict>, ...)``. A run remembers its base weights and config, so
``load_run`` needs nothing else.
"""

from rsfast.harma.checkpoint import load_run
from rsfast.harma.config import TrainConfig
from rsfast.harma.data import CaptionedImages, load_captions
from rsfast.harma.evaluation import Evaluation, evaluate
from rsfast.harma.images import BrokenImageError, ImageStore
from rsfast.harma.retrieval import retrieval_metrics
from rsfast.harma.training import TrainResult, train

__all__ = [
    "BrokenImageError",
    "CaptionedImages",
    "Evaluation",
    "ImageStore",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_captions",
    "load_run",
    "retrieval_metrics",
    "train",
]
