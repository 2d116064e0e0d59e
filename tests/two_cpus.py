"""Two logical CPUs, on which two replicas run."""

import tensorflow as tf


def split_cpu():
    """Before anything runs on TensorFlow: devices cannot be split afterwards."""
    if len(tf.config.list_physical_devices("CPU")) == 1:
        try:
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * 2,
            )
        except RuntimeError:  # another folder's tests did it already
            assert len(tf.config.list_logical_devices("CPU")) == 2
