/* SPDX-License-Identifier: Apache-2.0
 *
 * Lists of descriptors that stand in an array and name each other by number.
 *
 * Every list of the allocator is one of these two: a list that an element can leave from its middle
 * (free blocks, the balloon, fullness groups), or a stack (pageblocks, zspage numbers). A head is a
 * number too, NONE32 when the list is empty. The lock that guards the head guards the links.
 */
#ifndef ZRAMFS_LISTS_H
#define ZRAMFS_LISTS_H

#include "layout.h"

#define NUMBERED_LIST(name, type)                                                               \
	static inline void name##_push(type *array, uint32_t *head, uint32_t n)                 \
	{                                                                                       \
		uint32_t next = *head;                                                          \
		array[n].prev = NONE32;                                                         \
		array[n].next = next;                                                           \
		if (next != NONE32)                                                             \
			array[next].prev = n;                                                   \
		*head = n;                                                                      \
	}                                                                                       \
	static inline void name##_remove(type *array, uint32_t *head, uint32_t n)               \
	{                                                                                       \
		uint32_t prev = array[n].prev, next = array[n].next;                            \
		if (prev != NONE32)                                                             \
			array[prev].next = next;                                                \
		else                                                                            \
			*head = next;                                                           \
		if (next != NONE32)                                                             \
			array[next].prev = prev;                                                \
	}

/* pop: NONE32 from an empty stack. */
#define NUMBERED_STACK(name, type)                                                                   \
	static inline void name##_push(type *array, uint32_t *head, uint32_t n)                      \
	{                                                                                            \
		array[n].next = *head;                                                               \
		*head = n;                                                                           \
	}                                                                                            \
	static inline uint32_t name##_pop(type *array, uint32_t *head)                               \
	{                                                                                            \
		uint32_t n = *head;                                                                  \
		if (n != NONE32)                                                                     \
			*head = array[n].next;                                                       \
		return n;                                                                            \
	}

NUMBERED_LIST(page_list, page_desc_t)
NUMBERED_LIST(zspage_list, zspage_desc_t)
NUMBERED_STACK(pageblock_stack, pageblock_desc_t)
NUMBERED_STACK(zspage_stack, zspage_desc_t)

#endif
