# SPDX-License-Identifier: Apache-2.0
"""The machine around a device: mounts, loops, swap, processes, memory groups, programs."""
