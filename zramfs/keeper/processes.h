/* SPDX-License-Identifier: Apache-2.0
 * The processes that the keeper watches, by pidfds, and its log. */
#ifndef ZRAMFS_KEEPER_PROCESSES_H
#define ZRAMFS_KEEPER_PROCESSES_H

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "messages.h"

enum {
	PIDFD_OPEN = 434,	/* system call; the number is the same on all architectures but alpha */
	WATCHED = 4,		/* threads of a process whose end is told, at most */
};

struct process {
	pid_t pid;		/* 0 = none */
	int pidfd, sock, wake;
	bool has_status;
	int status;		/* as waitpid() gives it */
	int threads[WATCHED], watched;	/* pidfds, and how many there are: fence.h */
	bool serves, is_ready;	/* ready: a standby with nothing left to do */
	uint64_t since;		/* ms */
};

static const struct process NO_PROCESS = { .sock = -1, .pidfd = -1, .wake = -1 };

static uint64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	static char line[512];
	time_t now = time(NULL);
	struct tm tm;
	va_list arguments;
	size_t n = localtime_r(&now, &tm) ? strftime(line, sizeof(line), "%Y-%m-%d %H:%M:%S ", &tm) : 0;
	n += (size_t)snprintf(line + n, sizeof(line) - n, "WARNING zramfs.keeper: ");
	va_start(arguments, format);
	vsnprintf(line + n, sizeof(line) - n - 1, format, arguments);
	va_end(arguments);
	n = strlen(line);
	line[n] = '\n';
	if (write(2, line, n + 1) < 0)
		return;		/* a full disk is no reason to end */
}

/* Before all that is not real-time: little work, which others wait for. What is started runs as others do.
 * Without CAP_SYS_NICE nothing changes. */
static void make_haste(bool on)
{
	struct sched_param priority = { .sched_priority = on };
	sched_setscheduler(0, (on ? SCHED_RR : SCHED_OTHER) | SCHED_RESET_ON_FORK, &priority);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void process_drop_threads(struct process *p)
{
	while (p->watched)
		close(p->threads[--p->watched]);
}

static void process_forget(struct process *p)
{
	process_drop_threads(p);
	close_fd(&p->sock);
	close_fd(&p->pidfd);
	close_fd(&p->wake);
	*p = NO_PROCESS;
}

/* False, and `p` is none, if the process is not there any more. Takes the socket over. pidfd: -1 = there is none
 * yet. */
static bool process_adopt(struct process *p, pid_t pid, int sock, int pidfd)
{
	process_forget(p);
	p->sock = sock;
	p->pidfd = pidfd >= 0 ? pidfd : (int)syscall(PIDFD_OPEN, pid, 0);
	p->wake = eventfd(0, EFD_CLOEXEC);
	p->since = now_ms();
	p->pid = pid;
	if (p->pidfd >= 0 && p->wake >= 0)
		return true;
	say("process %d cannot be watched: %s", (int)pid, strerror(errno));
	process_forget(p);
	return false;
}

static bool process_spawn(struct process *p, char **command)
{
	int pair[2];
	pid_t pid;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
		say("no socket for another daemon: %s", strerror(errno));
		return false;
	}
	pid = vfork();
	if (pid == 0) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		if (pair[1] == 3)
			fcntl(3, F_SETFD, 0);
		else
			dup2(pair[1], 3);
		execv(command[0], command);
		_exit(127);
	}
	close(pair[1]);
	if (pid < 0) {
		say("another daemon cannot be started: %s", strerror(errno));
		close(pair[0]);
		return false;
	}
	return process_adopt(p, pid, pair[0], -1);
}

enum {
	OURS = 5,	/* words of the keeper before COMMAND: keeper.c */
	WORDS = 64,	/* of a command at most */
};

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

static bool process_ended(struct process *p)
{
	struct pollfd look = { .fd = p->pidfd, .events = POLLIN };
	return p->pid && poll(&look, 1, 0) > 0;
}

/* Stopped by a signal, or by a debugger. */
static bool process_stands_still(struct process *p)
{
	static char text[512];
	int fd, got;
	snprintf(text, sizeof(text), "/proc/%d/stat", (int)p->pid);
	fd = open(text, O_RDONLY | O_CLOEXEC);
	got = (int)read(fd, text, sizeof(text) - 1);
	close(fd);
	text[got > 0 ? got : 0] = 0;
	return strstr(text, ") T") || strstr(text, ") t");
}

#endif
