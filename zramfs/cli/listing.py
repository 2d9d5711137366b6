# SPDX-License-Identifier: Apache-2.0
"""zramfs list: what users of other tools type for status."""
from __future__ import annotations

import copy

from .status import status

list_command = copy.copy(status)
list_command.hidden = True
