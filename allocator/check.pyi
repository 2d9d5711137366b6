# SPDX-License-Identifier: Apache-2.0
from .arena import Arena
from .pool import Pool

class CheckError(AssertionError): ...

def check(what: Arena | Pool, level: int = 1) -> None: ...
