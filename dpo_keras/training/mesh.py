"""Meshes of devices on JAX: how rows and weights are split over them.

`keras.distribution` is the engine. What is here is which weights are split along which axis:
KerasHub's layout maps where there are some, ours for other families and for what those leave out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import keras

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.backends import axis_sizes, uses_jax
from dpo_keras.utils.keras_hub_families import backbone_class

Axes: TypeAlias = tuple[str | None, ...]

DATA, MODEL = "data", "model"

_EMBEDDINGS: dict[str, Axes] = {
    r"token_embedding/embeddings$": (MODEL, DATA),
    r"token_embedding/reverse_embeddings$": (DATA, MODEL),
}
_EXPERTS: dict[str, Axes] = {
    r"experts?(_bank)?/.*gate(_dense|_proj)$": (None, DATA, MODEL),
    r"experts?(_bank)?/up_proj$": (None, DATA, MODEL),
    r"experts?(_bank)?/(.*output_dense|down_proj)$": (None, MODEL, DATA),
}
_FEEDFORWARD: dict[str, Axes] = {
    r"feedforward_(intermediate|gate)_dense/kernel$": (DATA, MODEL),
    r"feedforward_(intermediate|gate)_dense/bias$": (MODEL,),
    r"feedforward_output_dense/kernel$": (MODEL, DATA),
}
_TRANSFORMER: dict[str, Axes] = {
    **_EMBEDDINGS,
    r"attention/(query|key|value)/kernel$": (DATA, MODEL, None),
    r"attention/(query|key|value)/bias$": (MODEL, None),
    r"attention/attention_output/kernel$": (MODEL, None, DATA),
    **_FEEDFORWARD,
    **_EXPERTS,
}
_GEMMA: dict[str, Axes] = {
    **_EMBEDDINGS,
    r"attention/(query|key|value)/kernel$": (MODEL, DATA, None),
    r"attention/attention_output/kernel$": (MODEL, None, DATA),
    r"ffw_gating(_2)?/kernel$": (DATA, MODEL),
    r"ffw_linear/kernel$": (MODEL, DATA),
    r"per_layer_(input_gate|model_projection)/kernel$": (DATA, MODEL),
    r"per_layer_up_proj/kernel$": (MODEL, DATA),
    **_EXPERTS,
}
LAYOUTS: dict[str, dict[str, Axes]] = {
    "GPT2Backbone": _TRANSFORMER,
    "LlamaBackbone": _TRANSFORMER,
    "Llama3Backbone": _TRANSFORMER,
    "MistralBackbone": _TRANSFORMER,
    "MixtralBackbone": _TRANSFORMER,
    "Phi3Backbone": _TRANSFORMER,
    "QwenBackbone": _TRANSFORMER,
    "Qwen3Backbone": _TRANSFORMER,
    "QwenMoeBackbone": _TRANSFORMER,
    "Qwen3MoeBackbone": _TRANSFORMER,
    "GemmaBackbone": _GEMMA,
    "Gemma3Backbone": _GEMMA,
    "Gemma4Backbone": _GEMMA,
}
"""Axes of the weights of a backbone, by the end of their paths; the first that fits counts."""


def distribution(
    family: Any = None,
    *,
    data: int = 1,
    model: int = 1,
    fsdp: bool = False,
    devices: Sequence[str] | None = None,
) -> keras.distribution.Distribution:
    """Make a `keras.distribution` of devices, on which a policy is trained in parts.

    Make the policy in its scope, or behind `keras.distribution.set_distribution`:

        keras.distribution.set_distribution(
            dpo_keras.distribution("llama3_8b_en", data=2, model=4, fsdp=True))
        policy = keras_hub.models.CausalLM.from_preset("llama3_8b_en")

    Adapters, the optimizer's state and copied references are split as their weights are.

    Args:
        family: what tells the policy's layout map: a KerasHub backbone or causal language model
            (the class or a model), or a preset. Not needed where no weight is split.
        data: number of devices along which the rows of a batch are split.
        model: number of devices along which weights are split.
        fsdp: whether weights are split along the data axis, too, and put together when they are
            needed (fully sharded data parallel).
        devices: names as of `keras.distribution.list_devices()`; by default the first of all.

    Returns:
        A `DataParallel`, or a `ModelParallel` that splits weights.

    Raises:
        InputError: another backend than JAX, more devices than there are, or a family without
            layout map. `compile` raises one where the model axis divides no weight.
    """
    problems = []
    for name, count in (("data", data), ("model", model)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            problems.append(InputProblem(f"mesh.{name}", "must be an integer >= 1", count))
    if problems:
        raise InputError(problems)
    if not uses_jax():
        rule = f"needs Keras on JAX, and it runs on {keras.backend.backend()}"
        hint = "Set training.backend: jax, or KERAS_BACKEND=jax before Keras is imported."
        raise InputError(InputProblem("mesh", rule, hint=hint))
    found = list(devices or keras.distribution.list_devices())
    if data * model > len(found):
        rule = f"needs {data} * {model} devices, and there are {len(found)}"
        hint = (
            "Choose fewer. To try a mesh on one CPU, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={data * model}."
        )
        raise InputError(InputProblem("mesh", rule, hint=hint))
    split = model > 1 or fsdp
    shape = (data, model) if split else (data,)
    mesh = keras.distribution.DeviceMesh(shape, (DATA, MODEL)[: len(shape)], found[: data * model])
    if not split:
        return keras.distribution.DataParallel(mesh, auto_shard_dataset=False)
    return SplitWeights(mesh, layouts_of(backbone_class(family), mesh), fsdp)


def layouts_of(backbone: type | None, mesh: keras.distribution.DeviceMesh) -> dict[str, Axes]:
    """Return the axes of a backbone's weights: KerasHub's map, then ours for what it leaves out.

    Raises:
        InputError: neither has a map for it.
    """
    name = getattr(backbone, "__name__", None)
    own = LAYOUTS.get(name or "", {})
    theirs: dict[str, Axes] = {}
    get_layout_map = getattr(backbone, "get_layout_map", None)
    if get_layout_map is not None:
        made = get_layout_map(mesh, MODEL, DATA)
        theirs = {f"{pattern}$": made[pattern].axes for pattern in made}
    if not own and not theirs:
        rule = f"has no layout map of {name or 'this model'}"
        hint = (
            f"There are maps of {', '.join(sorted(LAYOUTS))}. For another model give a "
            "keras.distribution.ModelParallel with a layout map of your own in Python, or split "
            "rows alone: mesh: {data: N}."
        )
        raise InputError(InputProblem("mesh", rule, hint=hint))
    return {**theirs, **own}


class SplitWeights(keras.distribution.ModelParallel):
    """A `ModelParallel` whose weights are split where their sizes allow it.

    An axis that does not divide the dimension that the map names goes to another one of the weight
    that it divides, the largest, such as from two heads of keys to their inputs; or to none.
    """

    def __init__(
        self, mesh: keras.distribution.DeviceMesh, layouts: Mapping[str, Axes], fsdp: bool
    ):
        map_of_nothing = keras.distribution.LayoutMap(mesh)
        super().__init__(layout_map=map_of_nothing, batch_dim_name=DATA, auto_shard_dataset=False)
        self.layouts, self.fsdp = dict(layouts), fsdp
        self.sizes = axis_sizes(mesh)

    def get_variable_layout(self, variable: keras.Variable) -> keras.distribution.TensorLayout:
        """Return how a variable is split."""
        given = getattr(variable, "_layout", None)
        if given is not None:
            return given
        shape = tuple(variable.shape)
        axes = self._fitting(self._axes(variable.path, len(shape)), shape)
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def _axes(self, path: str, rank: int) -> Axes:
        """Return the axes that the map names for a weight of this rank."""
        nothing: Axes = (None,) * rank
        place, _, name = path.rpartition("/")
        adapter = re.fullmatch(r"lora_(kernel|embeddings)_([ab])", name)
        if adapter is None:
            found = self._of(path)
            return found if len(found) == rank else nothing
        # W [..., out] is changed by A [..., rank] times B [rank, out].
        weight = self._of(f"{place}/{adapter[1]}")
        if len(weight) < 2:
            return nothing
        axes = (*weight[:-1], None) if adapter[2] == "a" else (None, weight[-1])
        return axes if len(axes) == rank else nothing

    def _of(self, path: str) -> Axes:
        axes = next((axes for end, axes in self.layouts.items() if re.search(end, path)), ())
        return tuple(None if axis == DATA and not self.fsdp else axis for axis in axes)

    def _fitting(self, axes: Axes, shape: tuple[int, ...]) -> Axes:
        found: list[str | None] = [None] * len(shape)
        homeless = []
        for place, axis in enumerate(axes):
            if axis is not None and shape[place] % self.sizes[axis] == 0:
                found[place] = axis
            elif axis is not None:
                homeless.append(axis)
        for axis in homeless:
            free = [n for n in range(len(shape)) if found[n] is None]
            free = [n for n in free if shape[n] > 1 and shape[n] % self.sizes[axis] == 0]
            if free:
                found[max(free, key=lambda n: shape[n])] = axis
        return tuple(found)


def check_split(variables: Sequence[keras.Variable]) -> None:
    """Refuse a mesh whose model axis divides none of a model's weights.

    Raises:
        InputError: no weight is split along it.
    """
    current = keras.distribution.distribution()
    if not isinstance(current, SplitWeights) or current.sizes[MODEL] == 1:
        return
    layouts = [getattr(variable, "_layout", None) for variable in variables]
    if not any(layout is not None and MODEL in layout.axes for layout in layouts):
        rule = f"divides no weight of this policy: model is {current.sizes[MODEL]}"
        hint = "Choose a divisor of its width, such as 2, 4 or 8."
        raise InputError(InputProblem("mesh.model", rule, hint=hint))
