# SPDX-License-Identifier: Apache-2.0

def prepare_thread() -> None:
    """Makes 64 KiB of the calling thread's stack resident. For threads that call a pool's functions beside
    those that serve swap: they must not wait for memory in the middle, with a lock in their hands."""
