# SPDX-License-Identifier: Apache-2.0
"""The FUSE protocol of `disk`, served by threads without the GIL."""
