"""Functions that a user's own code calls: a wrong argument is one line with the nearest name, as on the command line.

@public
def compress_model(model, output, *, corpus): ...
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from glmd.errors import ConfigError, suggestion

F = TypeVar("F", bound=Callable[..., Any])


def public(function: F) -> F:
    """The function, which raises ConfigError in place of TypeError for arguments that it does not take."""
    signature = inspect.signature(function)
    names = [each.name for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    takes_any = len(names) < len(signature.parameters)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        unknown = [] if takes_any else [name for name in keywords if name not in names]
        if unknown:
            raise ConfigError(f"{function.__name__} takes no {unknown[0]}{suggestion(unknown[0], names)}")
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise ConfigError(f"{function.__name__}{signature}: {error}") from None
        return function(*arguments, **keywords)

    return cast(F, call)
