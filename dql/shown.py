"""How a sentence shows a value that it refuses: in one short line, whatever the value is."""

from typing import Any

_LONGEST = 100


def shown(value: Any) -> str:
    """Its repr, cut where that is long or fails; of tensors and arrays kind, dtype and shape."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    try:
        if shape is not None and dtype is not None and len(shape):
            return f"a {type(value).__name__} of {str(dtype).removeprefix('torch.')} {list(shape)}"
        text = " ".join(repr(value).split())
    except Exception:  # of a class of somebody else's
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def said(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says, whatever somebody else's class makes of that."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # of a class of somebody else's
        lines = []
    return f"{type(error).__name__}: {lines[0][:160].rstrip('.')}" if lines else type(error).__name__
