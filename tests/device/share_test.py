# SPDX-License-Identifier: Apache-2.0
"""The command `share` of a device: what it takes, what it does, what shows it."""
from __future__ import annotations

import errno

import pytest
import trio

from tests.support.box import MIB, PAGE, Box
from tests.support.page_kinds import noise, prose
from zramfs.device import postprocess
from zramfs.device.postprocess import ShareArguments, parse_share
from zramfs.errors import ZramfsError
from zramfs.tree import metrics
from zramfs.tree.state import control_text

N = 512  # pages, of which the second half repeats the first


async def full(**more: object) -> Box:
    box = await Box(**{"size": 8 * MIB, **more}).start()
    for number in range(N):
        box.store.write(number * PAGE, prose(number % (N // 2)))
    return box


def holds(box: Box) -> bool:
    box.store.check(3)
    return box.store.read(0, N * PAGE) == 2 * b"".join(prose(number) for number in range(N // 2))


@pytest.mark.parametrize("text, wanted", [
    ("", ShareArguments()), ("idle=all", ShareArguments(marked=False)), ("idle=0x10", ShareArguments(age=16)),
])
def test_what_share_takes(text: str, wanted: ShareArguments) -> None:
    assert parse_share(text) == wanted


@pytest.mark.parametrize("text, code, words", [
    ("idle", errno.EINVAL, "KEY=VALUE"), ("idle=soon", errno.EINVAL, "all or an age"),
    ("level=3", errno.EINVAL, "share takes idle=, not"),
])
async def test_what_share_refuses(text: str, code: int, words: str) -> None:
    box = await full()
    with pytest.raises(ZramfsError, match=words) as caught:
        await box.device.command(f"share {text}")
    assert caught.value.errno == code
    assert box.store.stats().shared_pages == 0


async def test_marked_pages_share_or_old_ones_or_all() -> None:
    box = await full(access_times=True)
    await box.device.command("share")
    assert box.store.stats().shared_pages == 0
    await box.device.command("idle=all")
    box.store.read(0, 8 * PAGE)
    await box.device.command("share")
    assert box.store.stats().shared_pages == N - 16
    await box.device.command("share idle=3600")
    assert box.store.stats().shared_pages == N - 16, "nothing was unused for an hour"
    await box.device.command("share=idle=all")
    assert box.store.stats().shared_pages == N
    assert holds(box)


async def test_the_results_are_in_control_and_in_metrics_until_reset() -> None:
    box = await full()
    assert "shared       none\n" in control_text(box.device.stats())
    before = box.store.stats().compr_data_size
    await box.device.command("share idle=all")
    stats = box.device.stats()
    done = stats.sharing
    assert (done.looked, done.joined, done.made, done.table_bytes) == (N, N, N // 2, 0)
    assert done.bytes_saved >= before // 2
    assert "shared       512 pages in 256 objects of " in control_text(stats)
    text = metrics.openmetrics_text(box.device).decode()
    for line in ('shared_pages{device="z0"} 512.0', 'shared_objects{device="z0"} 256.0',
                 'share_looked_total{device="z0"} 512.0',
                 'share_pages_total{device="z0",result="joined"} 512.0',
                 'share_objects_total{device="z0"} 256.0', 'share_table_bytes{device="z0"} 0.0',
                 f'share_saved_bytes_total{{device="z0"}} {float(done.bytes_saved)}'):
        assert f"\nzramfs_{line}\n" in text
    await box.device.command("share idle=all")
    assert box.device.stats().sharing.joined == N
    assert box.device.stats().sharing.looked == 2 * N
    await box.device.command("reset")
    assert box.device.stats().sharing.joined == 0


async def test_share_without_a_size_or_access_times_is_refused_and_with_wiping_it_works() -> None:
    box = await Box().start()
    with pytest.raises(ZramfsError, match="not set up") as caught:
        await box.device.command("share")
    assert caught.value.errno == errno.EINVAL
    box = await full(wipe=True)
    with pytest.raises(ZramfsError, match="access_times=on") as caught:
        await box.device.command("share idle=1")
    assert caught.value.errno == errno.EINVAL
    await box.device.command("share idle=all")
    assert box.store.stats().shared_pages == N and holds(box)


async def test_units_beside_it_are_ebusy_its_table_is_shown_and_a_reset_cuts_it_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postprocess, "SLICE_NS", 1)
    box = await full()
    ended = []

    async def share() -> None:
        with pytest.raises(ZramfsError) as caught:
            await box.device.command("share idle=all")
        ended.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(share)
        while box.device.stats().sharing.looked == 0:
            await trio.sleep(0.001)
        assert 0 < box.device.stats().sharing.table_bytes <= 16 * N
        with pytest.raises(OSError, match="sharing or write-back") as caught:
            await box.device.command("units")
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(ZramfsError) as caught:
            await box.device.command("share")
        assert caught.value.errno == errno.EBUSY
        store = box.store
        await box.device.command("reset")
    assert ended == [errno.EINTR]
    with pytest.raises(ValueError, match="closed"):
        store.stats()


async def test_a_pool_without_room_for_any_object_is_enomem() -> None:
    """Of pages that do not compress, each in a page of the pool: one more is beyond the limit."""
    box = await Box(size=8 * MIB).start()
    for number in range(200):
        box.store.write(number * PAGE, noise(number % 100))
    box.store.set_mem_limit(PAGE)
    with pytest.raises(ZramfsError, match="no room") as caught:
        await box.device.command("share idle=all")
    assert caught.value.errno == errno.ENOMEM
    assert box.store.stats().shared_pages == 0
    box.store.set_mem_limit(0)
    await box.device.command("share idle=all")
    assert box.store.stats().shared_objects == 100
    assert box.store.read(0, 200 * PAGE) == 2 * b"".join(noise(number) for number in range(100))
