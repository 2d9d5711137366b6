# SPDX-License-Identifier: Apache-2.0
"""Measures zramfs beside kernel zram, nbdkit and an empty FUSE server; see benchmarks/README.md."""
