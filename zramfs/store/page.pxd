# SPDX-License-Identifier: Apache-2.0
"""One page of a device; see page.h."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "page.h" nogil:
    uint32_t boot_seconds() noexcept
    bint same_filled(const uint8_t* page, uint64_t* word) noexcept
    void fill_words(uint8_t* page, uint64_t word) noexcept
    uint64_t page_sum(const uint8_t* page, uint64_t seed) noexcept
    uint64_t bytes_sum(const uint8_t* p, uint32_t n, uint64_t seed) noexcept
