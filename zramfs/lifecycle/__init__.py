# SPDX-License-Identifier: Apache-2.0
"""From a command to a running device and back."""
