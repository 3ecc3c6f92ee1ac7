"""What a request asks of a technique: fields of its extra arguments, by prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_effplugin.errors import ConfigError

Wishes = TypeVar("Wishes", bound=BaseModel)


def parse_wishes(kind: type[Wishes], prefix: str, extra: Mapping[str, Any] | None) -> Wishes:
    """The fields whose first word is `prefix`; defaults without.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    given = {name: value for name, value in (extra or {}).items() if name.split("_")[0] == prefix}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise ConfigError(problems) from None
