/* SPDX-License-Identifier: Apache-2.0
 * Another version of the keeper in the same process, so that it stays the parent of the daemon, whose end it is
 * told of, and what a service manager watches. What it needs is in its words (keeper.c) and in open descriptors. */
#ifndef ZRAMFS_KEEPER_ANOTHER_PROGRAM_H
#define ZRAMFS_KEEPER_ANOTHER_PROGRAM_H

#include <stdlib.h>

#include "kept.h"
#include "processes.h"

enum {
	OURS = 5,	/* words of the keeper before COMMAND: keeper.c */
	WORDS = 64,	/* of a command at most */
};

static int way_back = -1;	/* words of the version before; -1 = there is none, or this one has proved itself */

/* All that goes along, or none of it. */
static void set_inherited(const struct process *server, const struct process *standby, bool is)
{
	int flags = is ? 0 : FD_CLOEXEC;
	fcntl(standby->sock, F_SETFD, flags);
	fcntl(server->sock, F_SETFD, flags);
	fcntl(server->pidfd, F_SETFD, flags);
	fcntl(way_back, F_SETFD, flags);
	for (int i = 0; i < nr_kept; i++)
		fcntl(kept[i], F_SETFD, flags);
}

/* Runs the program that a memory file names in this process: its words are there, each with a NUL behind it,
 * the program and then COMMAND. ours: the words between the two. Returns the errno of a failure. */
static int run_program(int fd, char *const ours[OURS - 1])
{
	static char *words[OURS + WORDS + 1];
	off_t size = lseek(fd, 0, SEEK_END);
	char *text = size > 0 ? mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0) : MAP_FAILED;
	char *at = text;
	int count = 1, error = EINVAL;
	if (text == MAP_FAILED)
		return errno ? errno : EINVAL;
	memset(words, 0, sizeof(words));
	memcpy(words + 1, ours, (OURS - 1) * sizeof(*ours));
	for (; !text[size - 1] && at < text + size && count < OURS + WORDS; at += strlen(at) + 1) {
		words[count == 1 ? 0 : count] = at;
		count = count == 1 ? OURS : count + 1;
	}
	if (at == text + size && count > OURS) {
		execv(words[0], words);
		error = errno;
	}
	munmap(text, (size_t)size);
	return error;
}

/* words_fd: as for run_program(). standby: one that goes along. bits: of the last SERVING. Returns the errno of a
 * failure. */
static int become_program(int words_fd, const struct process *server, const struct process *standby,
			  uint32_t bits, char *const own_words[])
{
	static char state[16 * (KEPT + 3)], pids[64];
	char *ours[] = { state, pids, own_words[3], own_words[4] };
	int error, n = snprintf(state, sizeof(state), "%d:%d:%u", server->sock, server->pidfd, bits);
	snprintf(pids, sizeof(pids), "%d:%d:%d:%d", (int)server->pid, way_back, (int)standby->pid, standby->sock);
	for (int i = 0; i < nr_kept; i++)
		n += snprintf(state + n, sizeof(state) - (size_t)n, ":%d", kept[i]);
	set_inherited(server, standby, true);
	error = run_program(words_fd, ours);
	set_inherited(server, standby, false);
	close_fd(&way_back);
	say("another program cannot be run in place of this keeper: %s", strerror(error));
	return error;
}

/* What the words say, of become_program() or of a first keeper. old_standby: of the version before. False if the
 * daemon is not there. */
static bool take_words(char *const words[], struct process *server, struct process *standby,
		       struct process *old_standby, uint32_t *bits)
{
	char *at, *more;
	struct process *waits;
	int fds[KEPT], n = 0, sock = (int)strtol(words[1], &at, 10);
	int pidfd = *at ? (int)strtol(at + 1, &at, 10) : -1;
	pid_t pid = (pid_t)strtol(words[2], &more, 10), waits_pid;
	way_back = *more ? (int)strtol(more + 1, &more, 10) : -1;
	waits = way_back >= 0 ? old_standby : standby;
	waits_pid = *more ? (pid_t)strtol(more + 1, &more, 10) : 0;
	if (!process_adopt(server, pid, sock, pidfd))
		return false;
	server->serves = *at != 0;
	if (*at)
		*bits = (uint32_t)strtoul(at + 1, &at, 10);
	while (*at && n < KEPT)
		fds[n++] = (int)strtol(at + 1, &at, 10);
	if (n)
		take_kept(fds, n);
	if (waits_pid && *more)
		waits->is_ready = process_adopt(waits, waits_pid, (int)strtol(more + 1, NULL, 10), -1);
	set_inherited(server, waits, false);
	return true;
}

#endif
