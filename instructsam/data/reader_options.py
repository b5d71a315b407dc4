"""From a configuration to the arguments of the reader that it names; whatever does not fit is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any


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
