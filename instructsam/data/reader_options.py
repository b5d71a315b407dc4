"""From a configuration to the arguments of the reader that it names, or to an object; whatever does not fit is told."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def reader_options(
    readers: Mapping[str, Callable[..., Any]],
    settings: Mapping[str, Any],
    where: str,
    others: Collection[str],
    given: Collection[str],
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The reader that ``settings["reader"]`` names, and the settings that are its arguments.

    Args:
        readers: those there are, by name.
        where: what is configured, for messages.
        others: settings that are not the reader's.
        given: arguments of the reader that do not come from the settings.

    Raises:
        ValueError: no such reader, settings that nobody knows, arguments that are needed and not given.
    """
    if settings.get("reader") not in readers:
        raise ValueError(f"{where}: reader {settings.get('reader')!r} is none of {', '.join(readers)}")
    reader = readers[settings["reader"]]
    parameters = inspect.signature(reader).parameters
    options = {key: value for key, value in settings.items() if key not in others and key != "reader"}
    if unknown := set(options) - (set(parameters) - set(given)):
        raise ValueError(f"{where}: unknown settings {', '.join(sorted(unknown))}")
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(key for key in needed - set(given) if options.get(key) is None):
        raise ValueError(f"{where}: not given: {', '.join(missing)}")
    return reader, options


def from_settings(cls: type[T], name: str, values: Mapping[str, Any]) -> T:
    """An object of a dataclass. Raises ValueError for names that it does not have, and whatever it complains of."""
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # a dataclass, as said
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return cls(**values)
