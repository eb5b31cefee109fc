"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.ablation import SWEEPS, ablate
from rsfast.deblora.arrays import Rows, as_rows
from rsfast.deblora.backbones import image_encoder
from rsfast.deblora.calibration import augment, auto_alpha, calibrate, calibrated_batches
from rsfast.deblora.centers import debiased_centers
from rsfast.deblora.clustering import cluster_features
from rsfast.deblora.clusters import Clusters
from rsfast.deblora.composition import class_cluster_counts
from rsfast.deblora.config import RunConfig
from rsfast.deblora.counts import ClassCounts, make_long_tailed
from rsfast.deblora.diffusion import StableDiffusionEncoder, sample_seed, stable_diffusion_encoder
from rsfast.deblora.exchange import export_parquet, import_pt
from rsfast.deblora.extraction import extract_features
from rsfast.deblora.features_file import LabelledFeatures, digits, load_features
from rsfast.deblora.inputs import FeatureInputs, ImageInputs
from rsfast.deblora.labelled import LabelledImages
from rsfast.deblora.learning import encode, learn_classes, learn_towards
from rsfast.deblora.linear import linear_probe
from rsfast.deblora.loading import load_labelled
from rsfast.deblora.logistic import logistic_probe
from rsfast.deblora.losses import class_loss
from rsfast.deblora.maps import ClassMaps, FullMap, LowRankMap
from rsfast.deblora.methods import METHODS
from rsfast.deblora.metrics import class_distances, class_f1, grouped_f1
from rsfast.deblora.neighbours import knn_probe
from rsfast.deblora.probe import hold_out
from rsfast.deblora.probing import PROBES
from rsfast.deblora.running import RunResult, run
from rsfast.deblora.store import FeatureStore, LeftOut

__all__ = [
    "METHODS",
    "PROBES",
    "SWEEPS",
    "ClassCounts",
    "ClassMaps",
    "Clusters",
    "FeatureInputs",
    "FeatureStore",
    "FullMap",
    "ImageInputs",
    "LabelledFeatures",
    "LabelledImages",
    "LeftOut",
    "LowRankMap",
    "Rows",
    "RunConfig",
    "RunResult",
    "StableDiffusionEncoder",
    "ablate",
    "as_rows",
    "augment",
    "auto_alpha",
    "calibrate",
    "calibrated_batches",
    "class_cluster_counts",
    "class_distances",
    "class_f1",
    "class_loss",
    "cluster_features",
    "debiased_centers",
    "digits",
    "encode",
    "export_parquet",
    "extract_features",
    "grouped_f1",
    "hold_out",
    "image_encoder",
    "import_pt",
    "knn_probe",
    "learn_classes",
    "learn_towards",
    "linear_probe",
    "load_features",
    "load_labelled",
    "logistic_probe",
    "make_long_tailed",
    "run",
    "sample_seed",
    "stable_diffusion_encoder",
]
