# SPDX-License-Identifier: Apache-2.0
"""Commands in a mount namespace of their own."""
from __future__ import annotations

from tests.support import leftovers

# A new namespace has a copy of every mount. While it lasts, a file system that another run unmounts stays in
# use there: its loop device is busy, and its device cannot be stopped. So the mounts of other runs go first.
# $owner is the name of this run. /proc/mounts has octal escapes, which a format of printf undoes.
LET_GO = r"""
while read -r source point rest; do
    case $point in
        *"$owner"*) ;;
        *zramfs_test_*) umount --lazy "$(printf "$point")" 2>/dev/null || true ;;
    esac
done </proc/self/mounts
"""


def apart(*words: object) -> list[str]:
    """The words that run a command there, as root."""
    code = f'owner=$0\n{LET_GO}exec "$@"'
    return ["unshare", "--mount", "sh", "-c", code, leftovers.owner_name(), *map(str, words)]
