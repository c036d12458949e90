# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: scikit-build-core's setuptools backend, plus one build requirement.

Compiling needs torch's headers. Listing torch under ``build-system.requires`` would download it
into every isolated build although the target environment nearly always has it already, so torch
is asked for only where none is found. What is asked for is the project's own run-time dependency,
word for word: the compiled library uses the stable ABI and so runs with any torch that meets it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scikit_build_core.setuptools import build_meta as _base
from scikit_build_core.setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_location import find_torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_ConfigSettings = dict[str, "str | list[str]"] | None


def _torch_requirement() -> list[str]:
    if find_torch() is not None:
        return []
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    return [d for d in pyproject["project"]["dependencies"] if d.startswith("torch")]


def get_requires_for_build_wheel(config_settings: _ConfigSettings = None) -> list[str]:
    """Return build requirements: cmake and ninja where the machine lacks them, maybe torch."""
    return [*_base.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: _ConfigSettings = None) -> list[str]:
    """Return what get_requires_for_build_wheel returns, for an editable install."""
    return [*_base.get_requires_for_build_editable(config_settings), *_torch_requirement()]
