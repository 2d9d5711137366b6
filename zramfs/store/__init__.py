# SPDX-License-Identifier: Apache-2.0
"""The pages of a device: compressed in the pool, the same everywhere, or on the backing store."""
