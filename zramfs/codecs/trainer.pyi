# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Buffer

def train(samples: Buffer, size: int, level: int) -> bytes: ...
