# SPDX-License-Identifier: Apache-2.0
"""Strings to numbers and back: sizes, the kernel's number formats, KEY=VALUE lists."""
