# SPDX-License-Identifier: Apache-2.0
"""The devices that configuration files describe."""
