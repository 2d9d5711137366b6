# SPDX-License-Identifier: Apache-2.0
"""The process of a device: it mounts, serves, tells the service manager, and ends."""
