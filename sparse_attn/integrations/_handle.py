# SPDX-License-Identifier: Apache-2.0
"""What every `enable` and `install` of this package returns: a way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

_Self = TypeVar("_Self", bound="Handle")


@dataclass
class Handle:
    """A registration that can be taken back; also a context manager.

    Attributes:
        name: under which name it was registered.
    """

    name: str
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def disable(self) -> None:
        """Put everything back as it was; a second call does nothing.

        What still uses the name fails at its next call: give it another one.
        """
        while self._undo:
            self._undo.pop()()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()
