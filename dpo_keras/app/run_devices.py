"""Where a run computes: the backend of Keras, and its `tf.distribute` strategy or its mesh."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dpo_keras.app.config import Config
from dpo_keras.app.config_rules import keys_for_arguments
from dpo_keras.app.keras_backend import choose_backend
from dpo_keras.app.models import FAMILIES
from dpo_keras.cluster.stop_request import sigterm_kept
from dpo_keras.errors import InputError, InputProblem

if TYPE_CHECKING:
    from dpo_keras.cluster import Cluster, Watchdog


class Devices(Protocol):
    """Where a run computes: a `tf.distribute.Strategy`, or what stands for it on JAX."""

    @property
    def num_replicas_in_sync(self) -> int:
        """How many replicas share a batch."""
        raise NotImplementedError

    def scope(self) -> Any:
        """Return the context in which models are made."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeshDevices:
    """The devices of the current `keras.distribution`; one without it."""

    num_replicas_in_sync: int

    def scope(self) -> Any:
        """Return a context that does nothing: `keras.distribution` is global."""
        return contextlib.nullcontext()


def devices_of(
    config: Config,
    name: str | None = None,
    *,
    cluster: Cluster | None = None,
    watchdog: Watchdog | None = None,
) -> Devices:
    """Make the strategy of a run, or set its mesh, before anything else touches the devices.

    Args:
        config: of the run.
        name: a strategy in place of the configuration's; a mesh stays.
        cluster: of the run's processes.
        watchdog: of the cluster.

    Raises:
        InputError: Keras runs on another backend, or the devices are not there.
    """
    choose_backend(config.training.backend, config.training.mesh is not None)
    from dpo_keras.utils.backends import data_axis_size, uses_jax

    if not uses_jax():
        from dpo_keras.training import strategy

        return strategy(name or config.training.strategy, watchdog=watchdog)
    import keras

    if cluster is not None and len(cluster.in_step) > 1:
        _join(cluster)
    keras.distribution.set_distribution(_distribution(config))
    return MeshDevices(data_axis_size())


def _join(cluster: Cluster) -> None:
    """Let JAX see the devices of all processes."""
    import jax
    import keras

    if jax.distributed.is_initialized():
        return
    with sigterm_kept():
        keras.distribution.initialize(
            job_addresses=cluster.chief.address,
            num_processes=len(cluster.in_step),
            process_id=cluster.in_step.index(cluster.this),
        )


def _distribution(config: Config) -> Any:
    import keras

    from dpo_keras.training.mesh import distribution
    from dpo_keras.utils.backends import process_count

    mesh, processes = config.training.mesh, process_count()
    found = keras.distribution.list_devices()
    if mesh is None:
        on_cpu = processes == 1 and all(device.startswith("cpu") for device in found)
        # Devices that are made of one CPU are for trying a mesh, and gain nothing.
        return None if on_cpu or len(found) == 1 else distribution(data=len(found))
    if processes > 1 and mesh.data * mesh.model != len(found):
        rule = f"must take all {len(found)} devices of the {processes} processes"
        raise InputError(InputProblem("training.mesh", f"{rule}, got {mesh.data} * {mesh.model}"))
    with keys_for_arguments(section="training"):
        return distribution(_family(config), **mesh.model_dump())


def _family(config: Config) -> Any:
    """Return the policy's backbone class, or a preset that tells it, before it is loaded."""
    import keras_hub

    scratch, mesh = config.model.scratch, config.training.mesh
    if scratch is not None:
        return getattr(keras_hub.models, f"{FAMILIES[scratch.family].prefix}Backbone")
    path = str(config.model.path)
    if path.endswith(".keras") and mesh is not None and (mesh.model > 1 or mesh.fsdp):
        rule = f"splits weights by the family of the policy, which {path} does not tell"
        hint = "Save it with dpo_keras.save_pretrained, and give that directory as model.path."
        raise InputError(InputProblem("mesh", rule, hint=hint))
    return None if path.endswith(".keras") else path


def check_devices(policy: Any) -> None:
    """Refuse a mesh that splits none of the policy's weights."""
    from dpo_keras.utils.backends import uses_jax

    if uses_jax():
        from dpo_keras.training.mesh import check_split

        check_split(policy.variables)
