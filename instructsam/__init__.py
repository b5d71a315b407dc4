"""InstructSAM: segment every instance that a free-form instruction asks for, in one pass.

from instructsam import InstructSAM

model = InstructSAM.from_pretrained("tiny")
result = model.segment("photo.jpg", "the two dogs on the left")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instructsam.inference.model import InstructSAM
    from instructsam.inference.results import Result

__all__ = ["InstructSAM", "Result"]
_HOMES = {"InstructSAM": "instructsam.inference.model", "Result": "instructsam.inference.results"}


def __getattr__(name: str) -> Any:
    """Load what is asked for only then: the package itself, its commands and its masks need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
