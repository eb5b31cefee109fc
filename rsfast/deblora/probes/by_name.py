"""The probes by name."""

from rsfast.deblora.probes.linear import linear_probe
from rsfast.deblora.probes.logistic import logistic_probe
from rsfast.deblora.probes.neighbours import knn_probe

# each is called as probe(features, labels, n_classes=, val=, loss=, device=) and has options of its own beside these
PROBES = {"linear": linear_probe, "logistic": logistic_probe, "knn": knn_probe}
