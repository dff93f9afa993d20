"""Where backends keep what they derive from an object, with the object."""

from typing import Any


class Kept(dict[Any, Any]):
    """A dict of things of this process (packed weights, handles): a copy, and a pickle, start empty."""

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()
