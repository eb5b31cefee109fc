"""The probes by name."""

from rsfast.deblora.linear import linear_probe
from rsfast.deblora.logistic import logistic_probe
from rsfast.deblora.neighbours import knn_probe

# each is called as probe(features, labels, n_classes=, val=, loss=, device=) and has options of its own beside these
PROBES = {"linear": linear_probe, "logistic": logistic_probe, "knn": knn_probe}
