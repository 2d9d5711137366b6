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

static bool process_ended(struct process *p)
{
	struct pollfd look = { .fd = p->pidfd, .events = POLLIN };
	return p->pid && poll(&look, 1, 0) > 0;
}

static void process_end(struct process *p)
{
	if (p->pid && !process_ended(p))
		kill(p->pid, SIGKILL);
	process_forget(p);
}

#endif
