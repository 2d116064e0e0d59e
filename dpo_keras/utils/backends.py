"""What Keras' backends do each in its own way: values in place of variables, compiled functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from dpo_keras.utils import Tensor


def uses_jax() -> bool:
    """Tell whether Keras runs on JAX."""
    return bool(keras.backend.backend() == "jax")


def process_count() -> int:
    """Return how many processes share the devices of Keras on JAX; 1 on TensorFlow."""
    if not uses_jax():
        return 1
    import jax

    return int(jax.process_count())


def leave_devices_to_jax() -> None:
    """Keep TensorFlow, whose pipelines feed JAX, from taking the memory of GPUs."""
    if uses_jax():
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # it has set up its devices
            tf.config.set_visible_devices([], "GPU")


class ValuesInPlace(keras.StatelessScope):
    """A block of code in which variables have other values, and keep what they are assigned.

    Keras' own scope hides the values of a scope around it, such as those of a step on JAX. This
    one adds to them.

    Attributes:
        read: ids of the variables that were read.
    """

    def __init__(self, values: Iterable[tuple[keras.Variable, Tensor]]):
        super().__init__(state_mapping=values)
        self.given = dict(self.state_mapping)
        self.read: set[int] = set()

    def get_current_value(self, variable: keras.Variable) -> Tensor | None:
        """Return the value of a variable in this block; None where it has its own."""
        self.read.add(id(variable))
        found = super().get_current_value(variable)
        around = self.original_scope
        return around.get_current_value(variable) if found is None and around else found

    def assigned(self, variables: Iterable[keras.Variable]) -> list[tuple[keras.Variable, Tensor]]:
        """Return the variables among `variables` that the block assigned, with their values."""
        now, before = self.state_mapping, self.given
        return [(v, now[id(v)]) for v in variables if now.get(id(v)) is not before.get(id(v))]


def unique_variables(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    """Return each variable once, in order."""
    return list({id(variable): variable for variable in variables}.values())


def state_variables(model: keras.Model) -> list[keras.Variable]:
    """Return all that a compiled model's training changes, each variable once, in order."""
    return unique_variables([*model.variables, *model.optimizer.variables])


def compiled(
    function: Callable[[Any], dict[str, Tensor]],
    variables: Sequence[keras.Variable],
    signature: Any = None,
    jit_compile: bool | None = None,
) -> Callable[[Any], dict[str, np.ndarray]]:
    """Compile a function of a batch that reads variables, and return NumPy arrays.

    Args:
        function: returns tensors by name.
        variables: what it reads; on JAX their values are arguments, and not constants.
        signature: of the batch, with which TensorFlow traces once for all shapes.
        jit_compile: whether TensorFlow compiles with XLA; JAX always does.
    """
    if uses_jax():
        import jax

        def on_values(values: list[Tensor], batch: Any) -> dict[str, Tensor]:
            with ValuesInPlace(zip(variables, values, strict=True)):
                return function(batch)

        on_jax = jax.jit(on_values, out_shardings=whole_on_each_device())

        def run(batch: Any) -> Any:
            return on_jax([variable.value for variable in variables], dict(batch))
    else:
        import tensorflow as tf

        given = None if signature is None else [signature]
        run = tf.function(function, input_signature=given, autograph=False, jit_compile=jit_compile)
    return lambda batch: {
        name: np.asarray(keras.ops.convert_to_numpy(value)) for name, value in run(batch).items()
    }


def on_own_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], variables: Sequence[keras.Variable]
) -> Tensor:
    """Call a function of rows that reads variables; on a mesh each device with its own rows.

    XLA splits most of a step by itself. Where rows are sorted, it would give all of them to each
    device. Shapes and dimension 0 of the result are those of the rows.
    """
    devices = data_axis_size()
    if devices == 1 or any(values.shape[0] % devices for values in rows):
        return function(*rows)
    import jax
    from jax import sharding

    current = keras.distribution.distribution()
    spec: Callable[..., Any] = sharding.PartitionSpec
    split = spec(current.batch_dim_name)

    def on_device(values: list[Tensor], *own: Tensor) -> Tensor:
        with ValuesInPlace(zip(variables, values, strict=True)):
            return function(*own)

    mapped: Callable[..., Tensor] = jax.shard_map(
        on_device,
        mesh=current.device_mesh.backend_mesh,
        in_specs=(spec(), *[split] * len(rows)),
        out_specs=split,
        axis_names={current.batch_dim_name},
        check_vma=False,
    )
    return mapped([variable.value for variable in variables], *rows)


def whole_on_each_device() -> Any:
    """Return the sharding of a result that every process reads; None without a mesh."""
    current = keras.distribution.distribution()
    if current is None:
        return None
    from jax import sharding

    spec: Callable[..., Any] = sharding.PartitionSpec
    return sharding.NamedSharding(current.device_mesh.backend_mesh, spec())


def of_each_process(value: float) -> Tensor:
    """Return what each process says, as one vector on the mesh: an argument of a compiled step."""
    import jax
    from jax import sharding

    current = keras.distribution.distribution()
    if current is None or process_count() == 1:
        return jax.numpy.full((1,), value, "float32")
    mesh = current.device_mesh.backend_mesh
    spec: Callable[..., Any] = sharding.PartitionSpec
    split = sharding.NamedSharding(mesh, spec(mesh.axis_names))
    own = np.full((len(mesh.local_devices),), value, np.float32)
    made: Callable[..., Tensor] = jax.make_array_from_process_local_data
    return made(split, own)


@contextlib.contextmanager
def values_of_all_processes(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Let each process read whole variables, in a block of code that all of them enter."""
    if process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    variables = unique_variables(variables)
    gathered = multihost_utils.process_allgather([v.value for v in variables], tiled=True)
    with ValuesInPlace(zip(variables, map(keras.ops.convert_to_tensor, gathered), strict=True)):
        yield


def axis_sizes(mesh: keras.distribution.DeviceMesh) -> dict[str, int]:
    """Return the number of devices along each axis of a mesh."""
    return dict(zip(mesh.axis_names, map(int, mesh.shape), strict=True))


def data_axis_size() -> int:
    """Return the number of devices along which the current `keras.distribution` splits rows."""
    current = keras.distribution.distribution() if uses_jax() else None
    return 1 if current is None else axis_sizes(current.device_mesh).get(current.batch_dim_name, 1)


def own_part_of_rows() -> tuple[int, int] | None:
    """Return which part of a batch's rows this process makes, and of how many; None: all rows."""
    if process_count() == 1:
        return None
    current = keras.distribution.distribution()
    import jax

    mesh = current.device_mesh.backend_mesh
    along = mesh.axis_names.index(current.batch_dim_name)
    here = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
    mine = np.flatnonzero(np.moveaxis(here, along, 0).reshape(here.shape[along], -1).any(axis=1))
    parts = mesh.devices.shape[along] // len(mine)
    return None if parts == 1 else (int(mine[0]) // len(mine), parts)


def softmax(scores: Tensor) -> Tensor:
    """Compute softmax over the last axis; Keras' own warns where a text has one token."""
    if uses_jax():
        import jax

        on_jax: Callable[[Tensor], Tensor] = jax.nn.softmax
        return on_jax(scores)
    import tensorflow as tf

    return tf.nn.softmax(scores)


def made_after(upstream: Tensor, tensors: Any) -> Any:
    """Copy tensors once `upstream` is there, so that no optimizer shares what is made of them."""
    if uses_jax():
        import jax

        leaves, structure = jax.tree.flatten(tensors)
        barrier: Callable[..., Any] = jax.lax.optimization_barrier
        *found, _ = barrier([*leaves, upstream])
        return jax.tree.unflatten(structure, found)
    import tensorflow as tf

    with tf.control_dependencies([upstream]):
        return keras.tree.map_structure(tf.identity, tensors)


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let JAX compute a function again in the backward pass, and keep its arguments alone."""
    import jax

    found: Callable[..., Any] = jax.checkpoint(function)
    return found
