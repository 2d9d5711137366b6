# SPDX-License-Identifier: Apache-2.0
"""Cython's names for lists.h: lists of descriptors that name each other by number."""
from libc.stdint cimport uint32_t

from allocator.layout cimport page_desc_t, pageblock_desc_t, zspage_desc_t

cdef extern from "lists.h" nogil:
    void page_list_push(page_desc_t* array, uint32_t* head, uint32_t n) noexcept
    void page_list_remove(page_desc_t* array, uint32_t* head, uint32_t n) noexcept
    void zspage_list_push(zspage_desc_t* array, uint32_t* head, uint32_t n) noexcept
    void zspage_list_remove(zspage_desc_t* array, uint32_t* head, uint32_t n) noexcept
    void pageblock_stack_push(pageblock_desc_t* array, uint32_t* head, uint32_t n) noexcept
    uint32_t pageblock_stack_pop(pageblock_desc_t* array, uint32_t* head) noexcept
    void zspage_stack_push(zspage_desc_t* array, uint32_t* head, uint32_t n) noexcept
    uint32_t zspage_stack_pop(zspage_desc_t* array, uint32_t* head) noexcept
