"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.arrays import Rows, as_rows
from rsfast.deblora.comparison.ablation import SWEEPS, ablate
from rsfast.deblora.comparison.config import RunConfig
from rsfast.deblora.comparison.methods import METHODS
from rsfast.deblora.comparison.running import RunResult, run
from rsfast.deblora.data.counts import ClassCounts, make_long_tailed
from rsfast.deblora.data.features import LabelledFeatures, digits, load_features
from rsfast.deblora.data.labelled import LabelledImages
from rsfast.deblora.data.loading import load_labelled
from rsfast.deblora.debiasing.calibration import augment, auto_alpha, calibrate, calibrated_batches
from rsfast.deblora.debiasing.centers import debiased_centers
from rsfast.deblora.debiasing.clustering import cluster_features
from rsfast.deblora.debiasing.clusters import Clusters
from rsfast.deblora.debiasing.composition import class_cluster_counts, classes_of_noise
from rsfast.deblora.features.backbones import image_encoder
from rsfast.deblora.features.diffusion import StableDiffusionEncoder, sample_seed, stable_diffusion_encoder
from rsfast.deblora.features.exchange import export_parquet, import_pt
from rsfast.deblora.features.extraction import extract_features
from rsfast.deblora.features.store import FeatureStore, LeftOut
from rsfast.deblora.learning.inputs import FeatureInputs, ImageInputs
from rsfast.deblora.learning.learn import encode, learn_classes, learn_towards
from rsfast.deblora.learning.losses import class_loss
from rsfast.deblora.learning.maps import ClassMaps, FullMap, LowRankMap
from rsfast.deblora.probes.by_name import PROBES
from rsfast.deblora.probes.linear import linear_probe
from rsfast.deblora.probes.logistic import logistic_probe
from rsfast.deblora.probes.metrics import class_distances, class_f1, grouped_f1
from rsfast.deblora.probes.neighbours import knn_probe
from rsfast.deblora.probes.probe import hold_out

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
    "classes_of_noise",
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
