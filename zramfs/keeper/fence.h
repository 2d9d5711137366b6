/* SPDX-License-Identifier: Apache-2.0
 * Whether a process that was killed can still touch anything that it shares with its successor.
 *
 * It can't when its last thread is gone. But before that, this thread unmaps all memory, which takes 0.4 to 1.1
 * us for each stored page: 110 to 400 ms for 1 GiB. Nobody has to wait for it: what a thread does from the
 * moment when it has set PF_EXITING itself is the kernel's, with private memory alone. The process is past when
 * all its threads have come there, and no other one can be made.
 *
 * A thread that ends is told by its own pidfd (Linux 6.9). Without that, without /proc, or where the flag has
 * another place in it, the process is past when its pidfd says so. */
#ifndef ZRAMFS_KEEPER_FENCE_H
#define ZRAMFS_KEEPER_FENCE_H

#include <dirent.h>
#include <stdlib.h>

#include "processes.h"

enum {
	EXITING = 4,			/* PF_EXITING, in the flags of /proc/PID/stat */
	OF_THREAD = O_EXCL,		/* PIDFD_THREAD of pidfd_open() */
	FLAGS_FIELD = 9, THREADS_FIELD = 20, EXIT_CODE_FIELD = 52,
	MEMBARRIER_GLOBAL = 1,
};

static bool fence_works;		/* PF_EXITING is where it is expected */

/* Of a thread, or of a process as a whole: /proc/PID/stat. state: T or t = stopped by a signal or a debugger.
 * status: that of waitpid(), once the process ends as a whole; 0 before, and after exit(0). */
struct seen {
	char state;
	unsigned int flags;
	long threads;
	int status;
};

/* dir: of /proc; name: "PID/stat". False if it is gone, or can't be read. */
static bool see(int dir, const char *name, struct seen *found)
{
	char text[1024], *at;
	int fd = openat(dir, name, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	close_fd(&fd);
	text[got > 0 ? got : 0] = 0;
	at = strrchr(text, ')');	/* ends the name, which may have any characters; the next field is 3 */
	memset(found, 0, sizeof(*found));
	if (at && at[1])
		found->state = at[2];
	for (int field = 3; at && field <= EXIT_CODE_FIELD; field++) {
		at = strchr(at + 1, ' ');
		if (!at)
			return false;
		if (field == FLAGS_FIELD)
			found->flags = (unsigned int)strtoul(at, NULL, 10);
		else if (field == THREADS_FIELD)
			found->threads = strtol(at, NULL, 10);
		else if (field == EXIT_CODE_FIELD)
			found->status = (int)strtol(at, NULL, 10);
	}
	return at != NULL;
}

static bool process_see(pid_t pid, struct seen *found)
{
	char name[64];
	snprintf(name, sizeof(name), "/proc/%d/stat", (int)pid);
	return see(AT_FDCWD, name, found);
}

static bool process_stands_still(struct process *p)
{
	struct seen now;
	return process_see(p->pid, &now) && (now.state == 'T' || now.state == 't');
}

/* To be called once, at the start: has a child that has ended the flag, and this process not? */
static void fence_try(void)
{
	struct seen own, ended;
	siginfo_t info;
	pid_t pid = vfork();
	if (pid == 0)
		_exit(1);
	fence_works = pid > 0 && !waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT)
		&& process_see(getpid(), &own) && process_see(pid, &ended)
		&& !(own.flags & EXITING) && ended.flags & EXITING && ended.status == 1 << 8;
	if (pid > 0)
		waitpid(pid, NULL, 0);
}

/* Calls `look` with the directory of the process's threads and the name of each one, until it returns false.
 * How many that were; -1 if they can't be listed at once. */
static int each_thread(pid_t pid, bool (*look)(void *context, int dir, const char *tid), void *context)
{
	static _Alignas(struct dirent64) char room[16384];	/* 680 threads */
	char name[64];
	int dir, count = 0;
	long got;
	snprintf(name, sizeof(name), "/proc/%d/task", (int)pid);
	dir = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	got = dir < 0 ? -1 : syscall(SYS_getdents64, dir, room, sizeof(room));
	for (long at = 0; at < got; at += ((struct dirent64 *)(room + at))->d_reclen) {
		const char *tid = ((struct dirent64 *)(room + at))->d_name;
		if (tid[0] == '.')
			continue;
		if (!look(context, dir, tid)) {
			got = -1;
			break;
		}
		count++;
	}
	close_fd(&dir);
	return got < 0 ? -1 : count;
}

static bool thread_is_past(void *unused, int dir, const char *tid)
{
	char name[32];
	struct seen found;
	(void)unused;
	snprintf(name, sizeof(name), "%s/stat", tid);
	/* One that was listed, and is gone, has ended. */
	return !see(dir, name, &found) ? faccessat(dir, tid, F_OK, 0) != 0 : (found.flags & EXITING) != 0;
}

/* A process that ends as a whole (its status is set) and whose first thread is on its way out makes no other
 * thread, so that the number of threads only falls: if as many as there were are listed, all of them are. */
static bool process_is_past(struct process *p)
{
	struct seen all;
	int listed;
	if (!fence_works || !process_see(p->pid, &all) || !all.status || !(all.flags & EXITING))
		return false;
	listed = each_thread(p->pid, thread_is_past, NULL);
	if (listed < 0 || listed < all.threads)
		return false;
#if !defined(__x86_64__)
	/* What the threads have stored is there for everybody before what the successor reads. */
	if (syscall(SYS_membarrier, MEMBARRIER_GLOBAL, 0, 0))
		return false;
#endif
	p->has_status = true;
	p->status = all.status;
	return true;
}

static bool watch_thread(void *context, int dir, const char *tid)
{
	struct process *p = context;
	(void)dir;
	if (p->watched < WATCHED && atoi(tid) != p->pid) {
		int fd = (int)syscall(PIDFD_OPEN, atoi(tid), OF_THREAD);
		if (fd >= 0)
			p->threads[p->watched++] = fd;
	}
	return true;
}

/* Has the ends of some of its threads told, by which one learns that it may end. To be called again and again:
 * threads come and go. */
static void process_watch_threads(struct process *p)
{
	if (fence_works && p->pid && p->watched < WATCHED) {
		process_drop_threads(p);
		each_thread(p->pid, watch_thread, p);
	}
}

static bool process_may_end(struct process *p)
{
	struct seen all;
	return process_see(p->pid, &all) && all.status;
}

/* Whether one of the watched threads has ended, and the whole process ends with it. */
static bool process_ends(struct process *p)
{
	struct pollfd look[WATCHED];
	int kept = 0;
	for (int i = 0; i < p->watched; i++)
		look[i] = (struct pollfd){ .fd = p->threads[i], .events = POLLIN };
	if (!p->watched || poll(look, (nfds_t)p->watched, 0) <= 0)
		return false;
	for (int i = 0; i < p->watched; i++)
		if (look[i].revents)
			close(p->threads[i]);
		else
			p->threads[kept++] = p->threads[i];
	p->watched = kept;
	return process_may_end(p);
}

#endif
