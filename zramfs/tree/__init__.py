# SPDX-License-Identifier: Apache-2.0
"""The directory of a device: which files it has, and what they say."""
