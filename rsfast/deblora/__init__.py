"""debLoRA end to end: features, clusters, de-biased centres, calibration, the LoRA learned towards them, probes."""

from rsfast.deblora.inputs import FeatureInputs, ImageInputs
from rsfast.deblora.learning import encode, learn_classes, learn_towards
from rsfast.deblora.linear import linear_probe
from rsfast.deblora.logistic import logistic_probe
from rsfast.deblora.losses import balanced_weights, class_loss, log_prior
from rsfast.deblora.maps import ClassMaps, FullMap, LowRankMap
from rsfast.deblora.neighbours import knn_probe
from rsfast.deblora.probe import hold_out
from rsfast.deblora.probing import PROBES

__all__ = [
    "PROBES",
    "ClassMaps",
    "FeatureInputs",
    "FullMap",
    "ImageInputs",
    "LowRankMap",
    "balanced_weights",
    "class_loss",
    "encode",
    "hold_out",
    "knn_probe",
    "learn_classes",
    "learn_towards",
    "linear_probe",
    "log_prior",
    "logistic_probe",
]
