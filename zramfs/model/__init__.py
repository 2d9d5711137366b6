# SPDX-License-Identifier: Apache-2.0
"""Frozen values that cross layers: what a device is made with, policies, statistics."""
