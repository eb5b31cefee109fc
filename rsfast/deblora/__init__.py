"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.backbones import image_encoder
from rsfast.deblora.diffusion import StableDiffusionEncoder, sample_seed, stable_diffusion_encoder
from rsfast.deblora.exchange import export_parquet, import_pt
from rsfast.deblora.extraction import extract_features
from rsfast.deblora.store import FeatureStore, LeftOut

__all__ = [
    "FeatureStore",
    "LeftOut",
    "StableDiffusionEncoder",
    "export_parquet",
    "extract_features",
    "image_encoder",
    "import_pt",
    "sample_seed",
    "stable_diffusion_encoder",
]
