# SPDX-License-Identifier: Apache-2.0
"""python -m zramfs.cli"""
import sys

from . import main

sys.exit(main())
