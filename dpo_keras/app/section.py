"""What the sections of a configuration share: habits, and types of values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dpo_keras.app.faults import Fault, raise_faults


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path | float | int) else value


def _one_or_all(values: list[Any] | None) -> Any:
    return values[0] if values and len(values) == 1 else values


OneOrMore = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_as_list),
    PlainSerializer(_one_or_all, return_type=Any),
]

_SWITCH = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
AutoSwitch = Annotated[
    Literal["auto", True, False],
    BeforeValidator(lambda v: _SWITCH.get(v.lower(), v) if isinstance(v, str) else v),
]


def _strategy_of_keras_3(value: Any) -> Any:
    if value == "parameter_server":
        raise PydanticCustomError(
            "parameter_server",
            "must be a strategy that Keras 3 has (for parameter servers write a program with "
            "dpo_keras.legacy, which trains models of tf-keras)",
        )
    return value


Strategy = Annotated[
    Literal["auto", "one_device", "mirrored", "multi_worker", "tpu"],
    BeforeValidator(_strategy_of_keras_3),
]

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Common habits: no unknown keys, finite numbers, immutable, rules over several keys.

    A subclass yields its rules over several keys from `faults`.
    """

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, frozen=True, validate_default=True
    )

    def faults(self) -> Iterator[Fault]:
        """Yields every broken rule that no single key's type can state."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Any:
        raise_faults(self.faults())
        return self
