"""Everything that is logged, as one tf-keras metric."""

from typing import Any

import tensorflow as tf
import tf_keras


class StepSums(tf_keras.metrics.Metric):
    """Weighted sums with their weights, by name: one variable for all of them.

    Sums are what can be added over steps, replicas and asynchronous workers.

    Args:
        names: what is measured.
        hidden: names among them that are not logged.
        derive: from averages by name to further figures.

    Example:
        >>> sums = StepSums(["loss", "pairs"], hidden=["pairs"])
        >>> for _ in range(2):
        ...     _ = sums.update_state({"loss": (6.0, 3.0), "pairs": (3.0, 1.0)})
        >>> {name: float(value) for name, value in sums.result().items()}, sums.total("pairs")
        ({'loss': 2.0}, 6.0)
    """

    def __init__(self, names: list[str], hidden: Any = (), derive: Any = None, **options: Any):
        super().__init__(dtype=options.pop("dtype", "float64"), **options)
        self.names = list(names)
        self._hidden = frozenset(hidden)
        self._derive: Any = derive or (lambda means: {})
        table = {"shape": (len(names), 2), "initializer": "zeros"}
        self.totals = self.add_weight("totals", **table)
        self.first = self.add_weight("first", **table)
        self.last = self.add_weight("last", **table)
        self.steps = self.add_weight("steps", shape=(), initializer="zeros")

    def update_state(self, sums: dict[str, Any]) -> Any:
        """Adds one step of one replica.

        Args:
            sums: `{name: (weighted sum, weight)}`.
        """
        share = tf.stack([tf.stack([tf.cast(v, self.dtype) for v in sums[n]]) for n in self.names])
        first = tf.where(tf.equal(self.steps, 0.0), share, tf.zeros_like(share))
        with tf.control_dependencies([first]):
            self.first.assign_add(first)
            self.last.assign(share)
            self.steps.assign_add(1.0)
            return self.totals.assign_add(share)

    def result(self) -> dict[str, Any]:
        """Averages since the last reset, of what is logged."""
        means = self.means(self.totals)
        shown = {name: mean for name, mean in means.items() if name not in self._hidden}
        return {**shown, **self._derive(shown)}

    def means(self, table: Any) -> dict[str, Any]:
        """Averages by name, hidden ones included.

        Args:
            table: `totals`, or `first` or `last`: the first or the latest step alone.
        """
        table = tf.cast(tf.convert_to_tensor(table), tf.float32)
        means = tf.unstack(tf.math.divide_no_nan(table[:, 0], table[:, 1]), num=len(self.names))
        return dict(zip(self.names, means, strict=True))

    def total(self, name: str) -> float:
        """The sum of one name since the last reset."""
        return float(tf.convert_to_tensor(self.totals)[self.names.index(name), 0])

    def reset_state(self) -> None:
        """Starts anew."""
        for variable in (self.totals, self.first, self.last, self.steps):
            variable.assign(tf.zeros(variable.shape, variable.dtype))
