"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.arrays import Rows, as_rows
from rsfast.deblora.calibration import augment, auto_alpha, calibrate, calibrated_batches
from rsfast.deblora.centers import debiased_centers
from rsfast.deblora.composition import class_cluster_counts
from rsfast.deblora.counts import ClassCounts, make_long_tailed
from rsfast.deblora.features_file import LabelledFeatures, digits, load_features
from rsfast.deblora.labelled import LabelledImages
from rsfast.deblora.loading import load_labelled
from rsfast.deblora.metrics import class_distances, grouped_f1

__all__ = [
    "ClassCounts",
    "LabelledFeatures",
    "LabelledImages",
    "Rows",
    "as_rows",
    "augment",
    "auto_alpha",
    "calibrate",
    "calibrated_batches",
    "class_cluster_counts",
    "class_distances",
    "debiased_centers",
    "digits",
    "grouped_f1",
    "load_features",
    "load_labelled",
    "make_long_tailed",
]
