# SPDX-License-Identifier: Apache-2.0
"""Views of a device from outside: samples of its files, the live screen, pictures."""
