# SPDX-License-Identifier: Apache-2.0
"""The list of devices on the screen of `zramfs top`: in which order, and with how many columns."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from zramfs.text.plain import plain

from .charts import BAD, DIM, GOOD, HEAD, MIB, WARN, amount, ratio_style, share_style, size, span, time_style
from .watched import ENDED, Watched, percentile

# Screens of this many columns have room for more of the list.
WIDE, VERY_WIDE = 110, 150
LEAST_NAME, LONGEST_STATE = 10, 24  # characters


def columns(*right: bool, padding: int = 2) -> Table:
    table = Table.grid(padding=(0, padding, 0, 0))
    for each in right:
        table.add_column(justify="right" if each else "left", no_wrap=True)
    return table


def limit_share(device: Watched) -> float | None:
    """Memory of the pool / its limit, None without a limit or without figures."""
    last = device.last
    limit = last.scrape.number("mem_limit_bytes") if last else 0.0
    return last.scrape.number("mem_used_bytes") / limit if last and limit else None


def slowest(device: Watched) -> float | None:
    """Seconds that 99 % of the requests of the last minute took at most."""
    return percentile(device.window.histogram(), 0.99) if device.window else None


def _rate(device: Watched, operation: str) -> float | None:
    # Of a device that does not answer there is no rate, only what it held.
    return device.rates.requests(operation) if device.ready and device.rates else None


def _bytes(device: Watched, operation: str) -> float | None:
    return device.rates.bytes(operation) if device.ready and device.rates else None


def _number(device: Watched, name: str) -> float | None:
    return device.last.scrape.number(name) if device.last else None


def _memory(device: Watched) -> float:
    return _number(device, "mem_used_bytes") or 0.0


@dataclass(frozen=True)
class Column:
    """key: that sorts by it, None if none does. from_width: columns that the screen needs for it."""

    name: str
    value: Callable[[Watched], float | None]
    words: Callable[[float], str]
    key: str | None = None
    from_width: int = 0
    style: Callable[[Watched, float], str] = lambda _device, _value: ""


COLUMNS = (
    Column("read/s", lambda d: _rate(d, "read"), amount, "r"),
    Column("write/s", lambda d: _rate(d, "write"), amount, "w"),
    Column("rMiB/s", lambda d: _bytes(d, "read"), lambda v: amount(v / MIB), from_width=VERY_WIDE),
    Column("wMiB/s", lambda d: _bytes(d, "write"), lambda v: amount(v / MIB), from_width=VERY_WIDE),
    Column("99 %", slowest, span, "l", WIDE, lambda _d, v: time_style(v)),
    Column("data", lambda d: _number(d, "orig_data_bytes"), size, "d"),
    Column("memory", lambda d: _number(d, "mem_used_bytes"), size, "m", 0,
           lambda d, _v: share_style(limit_share(d))),
    Column("limit", limit_share, lambda v: f"{100 * v:.0f} %", "f", WIDE, lambda _d, v: share_style(v)),
    Column("ratio", lambda d: d.last.ratio if d.last else None, lambda v: f"{v:.2f}", "c", 0,
           lambda d, v: ratio_style(v, _memory(d))),
)
BY_NAME = "n"
SORT_KEYS = {column.key: column for column in COLUMNS if column.key}


def ordered(devices: Sequence[Watched], key: str, reverse: bool) -> list[Watched]:
    """By name, or by the column with this key: the greatest first. Devices without a value come last whatever
    `reverse` says, and equal ones stay in the order of their names."""
    found = sorted(devices, key=lambda device: device.name)
    if key == BY_NAME:
        return found[::-1] if reverse else found
    value = SORT_KEYS[key].value
    known = [(value(device), device) for device in found]
    with_value = [(number, device) for number, device in known if number is not None]
    with_value.sort(key=lambda each: each[0] if reverse else -each[0])
    return [device for _, device in with_value] + [device for number, device in known if number is None]


def state_text(device: Watched) -> Text:
    style = GOOD if device.ready else WARN if device.state == ENDED else BAD
    return Text(plain(device.state), style)


def shortened(text: str, room: int) -> str:
    """Plain text of at most `room` characters. Names made of a directory differ at their ends."""
    text = plain(text)
    return text if len(text) <= room else f"~{text[1 - room:]}"


def list_devices(
    devices: Sequence[Watched], chosen: int, room: int, width: int, order: str, reverse: bool
) -> Table:
    """A heading and `room` of the devices, which are in order, with the chosen one among them."""
    first = max(0, min(chosen - room // 2, len(devices) - room))
    shown = devices[first:first + room]
    wanted = [column for column in COLUMNS if width >= column.from_width]
    cells = [[_cell(column, device) for column in wanted] for device in shown]
    heads = [_heading(column.name, column.key == order, reverse) for column in wanted]
    fixed = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    states = [state_text(device) for device in shown]
    for state in states:
        state.truncate(LONGEST_STATE, overflow="ellipsis")
    left = width - 3 - sum(each + 2 for each in fixed) - max(len(state) for state in states)
    places = [device.place.mounted or device.place.where for device in shown]
    name_room, place_room = _shares([device.name for device in shown], places, left, width >= WIDE)
    table = columns(False, False, *([False] if place_room else []), *[True] * len(wanted), False)
    table.add_row("", _heading("device", order == BY_NAME, not reverse), *(["on"] if place_room else []),
                  *heads, "state", style=HEAD)
    for device, row, place, state in zip(shown, cells, places, states, strict=True):
        is_chosen = device is devices[chosen]
        name = Text(shortened(device.name, name_room), HEAD if is_chosen else "")
        place_cell = [Text(shortened(place, place_room), DIM)] if place_room else []
        table.add_row(">" if is_chosen else " ", name, *place_cell, *row, state)
    return table


def _heading(name: str, is_order: bool, reverse: bool) -> str:
    # Plain characters, which every terminal has.
    return name if not is_order else f"{name} {'^' if reverse else 'v'}"


def _cell(column: Column, device: Watched) -> Text:
    value = column.value(device)
    if value is None:
        return Text("-")
    return Text(column.words(value), column.style(device, value))


def _shares(names: Sequence[str], places: Sequence[str], room: int, has_places: bool) -> tuple[int, int]:
    """Characters of the names and of the places, 0 for none."""
    longest = max(map(len, names))
    if not has_places:
        return max(LEAST_NAME, room - 2), 0
    room -= 4
    place = min(max(map(len, places)), max(LEAST_NAME, room - longest, room // 2))
    return max(LEAST_NAME, room - place), place
