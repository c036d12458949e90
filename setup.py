# SPDX-License-Identifier: Apache-2.0
"""Native build: CMake through scikit-build-core's setuptools plugin; the rest is pyproject.toml."""

from setuptools import setup

setup(
    cmake_source_dir=".",
    # One wheel serves every Python from 3.10 on: the library uses no Python C API at all.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
