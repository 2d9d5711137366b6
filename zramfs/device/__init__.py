# SPDX-License-Identifier: Apache-2.0
"""One device: its life from disksize to reset, its commands, and its background work."""
