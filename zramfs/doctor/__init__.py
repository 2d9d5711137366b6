# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of zramfs on this machine."""
