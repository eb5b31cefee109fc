"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.arrays import Rows, as_rows
from rsfast.deblora.calibration import augment, auto_alpha, calibrate, calibrated_batches
from rsfast.deblora.centers import debiased_centers
from rsfast.deblora.clustering import cluster_features
from rsfast.deblora.clusters import Clusters
from rsfast.deblora.composition import class_cluster_counts

__all__ = [
    "Clusters",
    "Rows",
    "as_rows",
    "augment",
    "auto_alpha",
    "calibrate",
    "calibrated_batches",
    "class_cluster_counts",
    "cluster_features",
    "debiased_centers",
]
