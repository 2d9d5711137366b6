# SPDX-License-Identifier: Apache-2.0
"""Images: a device in a file, as `zramfs save` writes it."""
