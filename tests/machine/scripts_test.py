# SPDX-License-Identifier: Apache-2.0
"""Shell scripts in the style of those that drive zram, with nothing changed but where the device is:
they must end alike, and say the same, on a zram device of the kernel and on one of ours.

$Z is the directory of the attributes. The functions `disk` and `release` answer and give back a block
device: with the kernel that is there from the beginning, with ours it is a loop device.
"""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.twins import Pair, reset_both
from tests.support.whole import run

pytestmark = pytest.mark.requires("fuse", "zram", "loop")

KERNEL = """
disk() { echo "/dev/${Z##*/}"; }
release() { :; }
"""
OURS = """
disk() { losetup --find --show --direct-io=on --sector-size 4096 "$Z/../disk"; }
release() { losetup --detach "$1"; }
"""

# zramctl writes in this order; it puts up with ENOENT of max_comp_streams, which is gone since 6.15.
ZRAMCTL = r"""
echo 1 > $Z/reset
echo 2 > $Z/max_comp_streams
echo "max_comp_streams: $?"
echo lz4 > $Z/comp_algorithm
echo "$((64 << 20))" > $Z/disksize
cat $Z/disksize $Z/initstate
read -r orig compr total limit max zero migrated rest < $Z/mm_stat
echo "$orig $compr $total $limit $max $zero $migrated"
echo 1 > $Z/reset && cat $Z/disksize
"""

# Debian's zram-tools: an algorithm, a size, mkswap, swapon with a priority; and back.
ZRAMSWAP = r"""
set -e
ALGO=lz4 SIZE=64 PRIORITY=-2
echo $ALGO > $Z/comp_algorithm
echo "$((SIZE * 1024 * 1024))" > $Z/disksize
DEV=$(disk)
mkswap $DEV > /dev/null
swapon $DEV
grep -c "^$DEV " /proc/swaps
swapoff $DEV
release $DEV
echo 1 > $Z/reset
cat $Z/initstate
"""

# zram-init and rc scripts: a file system with a limit, unmounted and reset in the end.
ZRAM_INIT = r"""
set -e
[ "$(cat $Z/initstate)" = 0 ]
alg=lz4
grep -qw -e "$alg" -e "\[$alg\]" $Z/comp_algorithm
printf '%s' $alg >| $Z/comp_algorithm
echo 64M >> $Z/disksize
echo 48M | tee $Z/mem_limit > /dev/null
DEV=$(disk)
mkfs.ext4 -q -O ^has_journal $DEV
mkdir -p $TMP/m
mount -o discard $DEV $TMP/m
yes 'a line of text' | head -c 4000000 > $TMP/m/file
cksum < $TMP/m/file
sync -f $TMP/m/file
echo 1 > $Z/reset || echo "reset: busy"
awk '{ print ($1 >= 4000000), ($1 > 10 * $3), $4 }' $Z/mm_stat
rm $TMP/m/file
fstrim $TMP/m
umount $TMP/m
release $DEV
echo 1 > $Z/compact
echo 0 > $Z/mem_used_max
awk '{ print ($1 < 4000000), ($5 == $3) }' $Z/mm_stat
# An initialised device must be reset before it can be set up anew.
echo 32M 2> /dev/null > $Z/disksize || echo "has a size"
until echo 1 2> /dev/null > $Z/reset; do sleep 0.05; done
cat $Z/disksize $Z/mm_stat
"""

# What the kernel's documentation and people's notes do to look at a device.
WATCHING = r"""
echo lz4 > $Z/comp_algorithm; echo 16M > $Z/disksize
sed 's/.*\[\(.*\)\].*/\1/' $Z/comp_algorithm
tr -d '[]' < $Z/comp_algorithm | xargs -n1 | grep -x lz4
head -c 8 $Z/mm_stat | wc -c
dd if=$Z/mm_stat bs=1 count=9 status=none | od -c | head -n 1
for i in 1 2 3; do cat $Z/io_stat; done
while read -r reads writes invalid notify; do echo "$reads/$writes/$invalid/$notify"; done < $Z/io_stat
paste -d, $Z/disksize $Z/initstate
sh -c 'read size < $Z/disksize; echo $((size / 1024))K'
numfmt --to=iec < $Z/disksize
test -r $Z/mm_stat -a ! -e $Z/nothing && echo there
stat -c '%A %s' $Z/mm_stat $Z/mem_limit $Z/disksize
wc -lc $Z/mm_stat $Z/io_stat
find $Z/ -maxdepth 1 -name 'mem_*' -printf '%f %m\n' | sort
cp $Z/disksize $TMP/saved; cmp $TMP/saved $Z/disksize && echo same
timeout 2 tail -f $Z/initstate; echo "tail: $?"
(exec 3< $Z/disksize; read -r a <&3; echo $a)
python3 -c 'import sys; print(open(sys.argv[1]).readlines())' $Z/initstate
"""

MISTAKES = r"""
try() { "$@"; echo "-> $?"; }
try sh -c 'echo > $Z/disksize'
try sh -c 'echo 0 > $Z/disksize'
try sh -c 'echo one > $Z/mem_limit'
try sh -c 'echo lz5 > $Z/comp_algorithm'
try sh -c 'echo 0 > $Z/reset'
try sh -c 'echo 1 > $Z/mm_stat'
try sh -c 'echo 1 > $Z/compact'
try cat $Z/mem_limit
try dd if=/dev/zero of=$Z/mem_used_max bs=1 count=1 status=none
try tee $Z/mem_used_max <<< 5
try cp /etc/hostname $Z/comp_algorithm
try truncate -s 0 $Z/disksize
try rm -f $Z/disksize
try touch $Z/new
try mv $Z/disksize $Z/size
echo 1M > $Z/disksize
try sh -c 'echo 2M > $Z/disksize'
try sh -c 'echo lz4 > $Z/comp_algorithm'
try sh -c 'printf "1\0junk" > $Z/reset'
cat $Z/initstate
"""

# The steps of LTP's zram01 for one device, and how it reckons.
LTP_ZRAM01 = r"""
set -e
for alg in $(sed 's/[][]//g' $Z/comp_algorithm); do echo $alg > $Z/comp_algorithm; done
echo lz4 > $Z/comp_algorithm
echo 26214400 > $Z/disksize; [ "$(cat $Z/disksize)" -eq 26214400 ]
echo 25M > $Z/mem_limit; [ "$(awk '{ print $4 }' $Z/mm_stat)" -eq 26214400 ]
DEV=$(disk); mkfs.ext4 -q $DEV; mkdir -p $TMP/m; mount -t ext4 $DEV $TMP/m
b=0; while dd conv=notrunc if=/dev/zero of=$TMP/m/file oflag=append count=64 bs=1024 2> /dev/null
do b=$((b + 64)); done
[ $b -gt 10000 ]; sync -f $TMP/m/file
used=$(awk '{ print $3 }' $Z/mm_stat); [ $used -gt 0 ]
v=$((100 * 1024 * b / used)); [ $v -ge 100 ] && echo "ratio above 1"
umount $TMP/m; release $DEV; until echo 1 2> /dev/null > $Z/reset; do sleep 0.05; done
"""

SCRIPTS = {
    "zramctl": ZRAMCTL, "zramswap": ZRAMSWAP, "zram-init": ZRAM_INIT, "watching": WATCHING,
    "mistakes": MISTAKES, "LTP's zram01": LTP_ZRAM01,
}


@pytest.mark.requires("ext4", "swap")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_alike(pair: Pair, name: str, tmp_path: Path) -> None:
    reset_both(pair)
    ends = []
    for twin, prelude in zip(pair, (KERNEL, OURS), strict=True):
        done = run("bash", "-c", f"export Z={twin.attributes} TMP={tmp_path}\n{prelude}{SCRIPTS[name]}",
                   check=False, timeout=150)
        said = (done.stdout + done.stderr).replace(f"{twin.attributes}", "$Z")
        ends.append((done.returncode, said.splitlines()))
    assert ends[1] == ends[0]
    assert ends[0][0] == 0 or name == "mistakes"
    assert ends[0][1]
