"""scikit-learn's interface to estimators, without scikit-learn."""

import inspect
import sys
import warnings
from typing import Any

from torch import Tensor

from rsfast.kmeans.estimators.inputs import Given, rows, sample_weights, taken
from rsfast.kmeans.estimators.sizes import Sizes
from rsfast.kmeans.functional import kmeans_assign, kmeans_distances
from rsfast.kmeans.functional.loop import total
from rsfast.kmeans.functional.plain import plain


class NotFittedError(ValueError, AttributeError):
    """A method was called that needs ``fit`` first."""


class ConvergenceWarning(UserWarning):
    """Fewer clusters were found than asked for."""


def ours_or_sklearns(kind: type) -> type:
    """scikit-learn's class of the same name where scikit-learn is in use, so that what catches its own catches ours."""
    return getattr(sys.modules.get("sklearn.exceptions"), kind.__name__, kind)


class Estimator:
    """Parameters by name, and what fitted centres are good for."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor arguments by name."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **params: Any):
        """Set constructor arguments by name; nothing is set if one is unknown."""
        known = self._parameters()
        for name in params:
            if name not in known:
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {type(self).__name__}. Valid parameters are: {known}"
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    @classmethod
    def _parameters(cls) -> list[str]:
        return sorted(inspect.signature(cls).parameters)

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        changed = {name: value for name, value in self.get_params().items() if value is not defaults[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __sklearn_tags__(self):
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags  # which is what asks

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(),
        )

    def get_feature_names_out(self, input_features: Any = None):
        """Names of the columns of ``transform``, in NumPy."""
        import numpy as np

        self._centers()
        name = type(self).__name__.lower()
        return np.asarray([f"{name}{i}" for i in range(len(self.cluster_centers_))], dtype=object)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None):
        """``fit(X).labels_``: under a size constraint these satisfy it, while ``predict`` knows rows one by one."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None):
        """``fit(X).transform(X)``."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    @plain
    def predict(self, X: Any):
        """Index of the nearest centre of every row, (N,) int64, in X's kind; ties go to the lowest index."""
        given, centers = self._new_rows(X)
        return given.back(self._nearest(given.tensor, centers).labels)

    @plain
    def transform(self, X: Any):
        """Distance (not squared) of every row to every centre, (N, K), in X's kind: fp32 (fp64 of fp64)."""
        given, centers = self._new_rows(X)
        return given.back(kmeans_distances(given.tensor, centers, impl=self.impl).sqrt())

    @plain
    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the weighted sum of squared distances to the nearest centres."""
        given, centers = self._new_rows(X)
        weights = sample_weights(sample_weight, given.tensor)
        return -float(total(self._nearest(given.tensor, centers).distances, weights))

    def _nearest(self, x: Tensor, centers: Tensor):
        return kmeans_assign(x, centers, precision=self.precision, impl=self.impl)

    def _centers(self) -> Any:
        if not hasattr(self, "cluster_centers_"):
            raise ours_or_sklearns(NotFittedError)(
                f"This {type(self).__name__} is not fitted yet: call 'fit' before this method."
            )
        return self.cluster_centers_

    def _new_rows(self, X: Any) -> tuple[Given, Tensor]:
        centers = taken(self._centers(), "cluster_centers_").tensor
        given = rows(X)
        self._check_width(given.tensor, centers.shape[1])
        return given, centers.to(given.tensor.device)

    def _check_width(self, x: Tensor, width: int) -> None:
        if x.shape[1] != width:
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting {width} features as input"
            )

    def _keep(self, given: Given, centers: Tensor, labels: Tensor | None, counts: Tensor, sizes: Sizes | None) -> None:
        """Attributes that were found, in the kind of what was given; no ``labels``: none were looked for."""
        self.cluster_centers_, self.counts_ = map(given.back, (centers, counts))
        self.n_features_in_ = centers.shape[1]
        for name in ("labels_", "subsidies_", "certified_"):
            self.__dict__.pop(name, None)
        if sizes is not None:
            self.subsidies_ = given.back(sizes.subsidies)
        if labels is None:
            return
        self.labels_ = given.back(labels)
        if sizes is not None:
            self.certified_ = bool(sizes.certified)

    def _warn_of_missing(self, labels: Tensor) -> None:
        found = len(labels.unique())
        if found < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters ({self.n_clusters}). "
                "Possibly due to duplicate points in X.",
                ours_or_sklearns(ConvergenceWarning),
                stacklevel=4,
            )
