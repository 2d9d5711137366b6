# SPDX-License-Identifier: Apache-2.0
"""zramfs: a compressed block device in RAM, served as one FUSE file."""

__version__ = "0.1.0"
