"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.arrays import Rows, as_rows
from rsfast.deblora.backbones import image_encoder
from rsfast.deblora.calibration import augment, auto_alpha, calibrate, calibrated_batches
from rsfast.deblora.centers import debiased_centers
from rsfast.deblora.clustering import cluster_features
from rsfast.deblora.clusters import Clusters
from rsfast.deblora.composition import class_cluster_counts
from rsfast.deblora.counts import ClassCounts, make_long_tailed
from rsfast.deblora.diffusion import StableDiffusionEncoder, sample_seed, stable_diffusion_encoder
from rsfast.deblora.exchange import export_parquet, import_pt
from rsfast.deblora.extraction import extract_features
from rsfast.deblora.features_file import LabelledFeatures, digits, load_features
from rsfast.deblora.labelled import LabelledImages
from rsfast.deblora.loading import load_labelled
from rsfast.deblora.metrics import class_distances, grouped_f1
from rsfast.deblora.store import FeatureStore, LeftOut

__all__ = [
    "ClassCounts",
    "Clusters",
    "FeatureStore",
    "LabelledFeatures",
    "LabelledImages",
    "LeftOut",
    "Rows",
    "StableDiffusionEncoder",
    "as_rows",
    "augment",
    "auto_alpha",
    "calibrate",
    "calibrated_batches",
    "class_cluster_counts",
    "class_distances",
    "cluster_features",
    "debiased_centers",
    "digits",
    "export_parquet",
    "extract_features",
    "grouped_f1",
    "image_encoder",
    "import_pt",
    "load_features",
    "load_labelled",
    "make_long_tailed",
    "sample_seed",
    "stable_diffusion_encoder",
]
