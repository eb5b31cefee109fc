"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.store import FeatureStore, LeftOut

__all__ = ["FeatureStore", "LeftOut"]
