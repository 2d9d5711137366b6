# SPDX-License-Identifier: Apache-2.0
"""What people and scripts write into attributes, and what nobody should: by hand, and by hypothesis."""
from __future__ import annotations

from hypothesis import strategies as st

SIZES = (b"0", b"4096", b"4097", b"1k", b"3K", b"2M", b"1G", b"1T", b"1P", b"1E", b"16E", b"010", b"0x10K",
         b"0X10k", b"0xg", b"09", b"1junk", b"5000 ", b"5000\n", b"8192\0junk", b"K", b"M\n",
         b"99999999999999999999999", b"18446744073709551615", b"junk", b" 5000", b"+5000", b"-1", b"\0",
         b"\n", b"\xff\xfe", b"4K" + b"x" * 5000)
NUMBERS = (b"0", b"0\n", b"00", b"+0", b"-0", b"0x0", b"1", b"+1", b"1\n", b"65535", b"65536", b"0 ", b" 1",
           b"1 ", b"0\n\n", b"1\n\n", b"0\0junk", b"1\0x", b"99999999999999999999999", b"junk", b"-1", b"\n",
           b"\xd9\xa1", b"1" * 4096)
NAMES = (b"lz4", b"lz4\n", b"lz4 ", b" lz4", b"LZ4", b"lz", b"lz4\0junk", b"lz4:1", b"[lz4]", b"\n", b"\0",
         b"x" * 126 + b"\n", b"x" * 127, b"x" * 127 + b"\n", b"x" * 128, b"x" * 5000, b"\xff")

# algorithm_params, for a device with lz4 alone.
PARAMETERS = (
    b"algo=lz4", b"algo=lz4 level=1", b"level=4", b"priority=0", b"priority=1", b"priority=4", b"priority=x",
    b"priority=-1", b"priority=256", b"priority=99999999999", b"priority=+0", b"priority=0x0", b"level=x",
    b"level=", b"level", b"algo", b"algo=", b"foo=1", b"foo", b"\n", b"algo=nosuch",
    b"dict=/nonexistent", b"dict=", b"dict=relative", b"dict=/", b"dict=/dev/null", b"deflate.winbits=1",
    b"deflate.winbits=x", b"level=99999999999", b"level=99999999999x", b"level=2147483648", b"level=0x10",
    b"level=+3", b"level=-3", b"level=99999999999999999999x", b"level=-2147483649", b'"level=3"',
    b'level="3"', b'"level"=3', b"level=3\0junk", b" level=3", b"level=3 ", b"level=3\n", b"level=3\n\n",
    b"level = 3", b"level=3,foo", b"level=3 level=x", b"x" * 5000, b"level=1 " + b"x" * 5000, b"=3",
    b"-- level=x", b"-level=x", b"level=1 --", b"level=3\tpriority=0", b"level=3\vpriority=x",
    b'dict="/etc/hostname',
)
IDLE = (b"all", b"all\n", b"all\n\n", b"all ", b" all", b"ALL", b"al", b"allx", b"all\0x", b"0", b"1",
        b"junk", b"-1", b"\n", b"\0")

# Pieces that parsers look for, in any order, and any bytes at all.
_PIECES = (b"0", b"1", b"3", b"7", b"8", b"9", b"0x", b"f", b"K", b"m", b"G", b"E", b"+", b"-", b" ", b"\t",
           b"\n", b"\0", b"=", b'"', b"'", b"#", b".", b"%", b"/", b"lz4", b"zstd", b"junk", b"y", b"off",
           b"18446744073709551616", b"2147483648", b"\xff", b"\xc3\xa9")
# What lists of KEY=VALUE and the modes of write-back are made of.
_WORDS = (b"algo=", b"priority=", b"level=", b"dict=", b"type=", b"threshold=", b"max_pages=", b"page_index=",
          b"page_indexes=", b"deflate.winbits=", b"idle", b"huge", b"huge_idle", b"incompressible", b"all")
assembled = st.lists(st.sampled_from(_PIECES), max_size=8).map(b"".join)
phrases = st.lists(st.sampled_from(_PIECES + _WORDS * 2), max_size=10).map(b"".join)
texts = st.one_of(assembled, st.binary(max_size=12))
