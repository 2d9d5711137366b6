# SPDX-License-Identifier: Apache-2.0
from typing import Final

from typing_extensions import Buffer

# Bytes: the longest that a codec takes and gives.
MAX_INPUT: Final[int]
# Bytes: the longest dictionary.
MAX_DICTIONARY: Final[int]

class Codec:
    algo: Final[str]
    level: Final[int]
    @property
    def dictionary(self) -> bytes | None: ...
    def __init__(self, algo: str, level: int | None = None, dictionary: bytes | None = None, *,
                 only_decompresses: bool = False) -> None: ...
    def compress(self, data: Buffer, cap: int | None = None) -> bytes | None: ...
    def decompress(self, data: Buffer, size: int) -> bytes: ...

def parse(spec: str) -> Codec: ...
