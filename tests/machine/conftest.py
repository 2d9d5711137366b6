# SPDX-License-Identifier: Apache-2.0
"""A zram device of the kernel and one of ours, for the tests that compare them."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.twins import Pair, reset_both, twin_devices


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with twin_devices(tmp_path_factory.mktemp("twins") / "z") as pair:
        yield pair


@pytest.fixture
def twins(pair: Pair) -> Pair:
    reset_both(pair)
    return pair
