# SPDX-License-Identifier: Apache-2.0
"""The compressors, their dictionaries, and how both are named."""
