# SPDX-License-Identifier: Apache-2.0
"""The process that keeps a device's descriptors and starts its daemon anew, and the daemon's end of it."""
