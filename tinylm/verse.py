"""The text column of a pickled table, read without running anything that the pickle names.

The one place where the lab reads a pickle: a single pinned file whose hash has been checked. Every class or function in
it is replaced by an inert stand-in, so that loading it builds lists of strings and nothing else.
"""

from __future__ import annotations

import gzip
import pickle
import zlib
from typing import Any, BinaryIO

from tinylm.errors import DamagedFileError


class Inert:
    """Stands in for every class and function of a pickle: keeps what it is given, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs, self.state = args, kwargs, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertUnpickler(pickle.Unpickler):
    """Resolves every name in a pickle to ``Inert``; nothing is imported and nothing is called."""

    def find_class(self, module: str, name: str) -> type:
        return Inert


def text_column(stream: BinaryIO, column: str = "text") -> list[str]:
    """The strings of one column of a gzip-pickled pandas table, in order.

    The layout is that of pandas 1.0: the table's state holds a manager, whose state begins with the axes, the blocks
    (one array for each type, with a column of the table in each row) and the names of the columns in each block.
    Raises DamagedFileError where the pickle is anything else.
    """
    try:
        table = InertUnpickler(gzip.GzipFile(fileobj=stream)).load()
        _, blocks, names = table.state["_data"].state[:3]
        for block, index in zip(blocks, names, strict=True):
            labels = _array(index.args[1]["data"])[1]
            if column in labels:
                (rows, width), values = _array(block)
                if not (isinstance(values, list) and len(values) == rows * width and rows == len(labels)):
                    raise ValueError(f"{rows} x {width} cells, but {len(values)} values")
                row = labels.index(column)
                column_values = values[row * width : (row + 1) * width]
                if not all(type(value) is str for value in column_values):
                    raise ValueError(f"column {column!r} holds more than strings")
                return column_values
        raise ValueError(f"no column {column!r}")
    except (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError, OSError, EOFError) as error:
        raise _damaged(error) from error
    except zlib.error as error:
        raise _damaged(error) from error


def _array(array: Inert) -> tuple[tuple[int, ...], list]:
    """Shape and values of a pickled numpy array; its state is version, shape, type, whether by columns, values."""
    _, shape, _, by_columns, values = array.state
    if by_columns:
        raise ValueError("an array stored by columns")
    return shape, values


def _damaged(error: Exception) -> DamagedFileError:
    return DamagedFileError(
        "The table must be a pickled pandas table with a column of text",
        f"{type(error).__name__}: {error}",
        "remove the wheel from the cache and fetch the text again",
    )
