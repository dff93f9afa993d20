"""Triton's interpreter, made quicker for tests: what it does for nothing at every operation is left out.

The operations, what they check and their results are its own. The interpreter of a release of Triton that was not
tried, or that has other insides, stays as it is.
"""

import importlib.metadata
from functools import cache
from typing import Any

from dql.kernels.triton.internals import TRIED


@cache
def quicken() -> bool:
    """Gives whether it is quicker now. Before the first kernel runs, in a process that interprets kernels and compiles
    none.

    - A call of one jit function by another looks through all of Triton's language for what is to be exchanged for the
      interpreter's, which the launch has done already.
    - A tensor's dtype is looked up in a table that is made for it.
    - Two blocks of one shape are compared entry by entry, or (3.6) broadcast to it.
    - Whether an integer overflows is worked out by six operations on tensors, for an assertion that is switched off.
    """
    if ".".join(importlib.metadata.version("triton").split(".")[:2]) not in TRIED:
        return False
    try:
        from triton.runtime import interpreter

        semantic, tl = type(interpreter.interpreter_semantic), interpreter.tl
        own = (
            interpreter._patch_lang,
            interpreter._get_np_dtype,
            semantic.broadcast_impl_value,
            semantic.binary_op_sanitize_overflow_impl,
        )
        none, is_builtin = interpreter._LangPatchScope, tl.core.is_builtin
    except (ImportError, AttributeError):
        return False
    patch_lang, np_dtype, broadcast, overflow = own
    languages: dict[Any, list[Any]] = {}
    dtypes: dict[tuple[bool, str], Any] = {}

    def exchanged_once(function: Any) -> Any:
        if function not in languages:
            seen = function.__globals__.values()
            languages[function] = [lang for lang in (tl, tl.core) if any(value is lang for value in seen)]
        if languages[function] and all(not is_builtin(lang.load) for lang in languages[function]):
            return none()  # there is nothing to put back
        return patch_lang(function)

    def dtype_of(dtype: Any) -> Any:
        """Of a block it is that of its elements."""
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        key = (isinstance(element, tl.pointer_type), element.name)
        if key not in dtypes:
            dtypes[key] = np_dtype(dtype)
        return dtypes[key]

    def broadcast_unless_equal(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def no_check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        """Without the option `debug` an assertion on a device, which the result is for, is none."""
        if self.builder.options.debug:
            overflow(self, lhs, rhs, operation)

    interpreter._patch_lang, interpreter._get_np_dtype = exchanged_once, dtype_of
    semantic.broadcast_impl_value, semantic.binary_op_sanitize_overflow_impl = broadcast_unless_equal, no_check
    return True
