"""scikit-learn's interface to k-means."""

from rsfast.kmeans.estimators.base import ConvergenceWarning, NotFittedError
from rsfast.kmeans.estimators.kmeans import KMeans
from rsfast.kmeans.estimators.minibatch import MiniBatchKMeans

__all__ = ["ConvergenceWarning", "KMeans", "MiniBatchKMeans", "NotFittedError"]
