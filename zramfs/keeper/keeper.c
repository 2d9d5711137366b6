/* SPDX-License-Identifier: Apache-2.0
 * The keeper of a device: holds the descriptors that must outlive its daemon, and starts the next daemon
 * when one ends. It knows nothing of what they hold.
 *
 *   zramfs-keeper SOCKET PID RUNDIR HANG_MS COMMAND...
 *
 * SOCKET: its end of a socket pair to the daemon, process PID, which serves or is about to. RUNDIR: locked
 * as long as the keeper lives. HANG_MS: a request in hand for longer ends the daemon. COMMAND: starts another
 * daemon, which finds its socket as descriptor 3.
 *
 * One end of a daemon is told by its pidfd, which is readable when its last thread is gone: then nobody
 * writes to the memory any more. What a daemon has said before that end is still read.
 *
 * Everything is allocated, touched and locked at the start. */
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "hands.h"
#include "processes.h"

#ifndef PR_SET_IO_FLUSHER		/* Linux 5.6 */
#define PR_SET_IO_FLUSHER 57
#endif
enum {
	PAGE_AT = 1,		/* of kept_page.h, among what is kept */
	LOOKS = 6,		/* at the requests in hand, within HANG_MS */
	DEATHS = 5,		/* without serving, within DEATHS_MS: the device ends */
	DEATHS_MS = 60000,
	START_MS = 120000,	/* a start that takes longer has failed */
	STACKS_MS = 1000,	/* for a daemon that hangs to write its stacks */
	STANDBY_MS = 200,	/* pause before a standby is started: the takeover comes first */
	STANDBY_MOST_MS = 60000,
	PAGE = 4096,
	STACK = 32768,		/* that is made resident */
};

static struct process server, standby;
static int kept[KEPT], nr_kept;
static struct kept_page *page;
static uint32_t bits;		/* of the last SERVING */
static bool ever_served, ending, blamed;
static int stop_signal;
static uint64_t stop_until;	/* a signal that was refused is forgotten then */
static uint64_t death_at[DEATHS];
static unsigned int deaths;	/* in a row without serving */
static uint64_t standby_due, standby_pause = STANDBY_MS;
static uint64_t look_ms, look_due, kill_due;
static struct hand_watch watch;
static char **command;

static void drop_kept(void)
{
	if (page)
		munmap(page, KEPT_BYTES);
	page = NULL;
	while (nr_kept)
		close(kept[--nr_kept]);
}

static void take_kept(const int *fds, int count)
{
	struct stat seen;
	void *found;
	drop_kept();
	memcpy(kept, fds, (size_t)count * sizeof(int));
	nr_kept = count;
	if (count <= PAGE_AT || fstat(kept[PAGE_AT], &seen) || seen.st_size < KEPT_BYTES)
		return;
	found = mmap(NULL, KEPT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, kept[PAGE_AT], 0);
	if (found == MAP_FAILED)
		return;
	mlock(found, KEPT_BYTES);
	page = found;
}

/* The descriptors for a process that is to take over at once or later. */
static void pass_kept(struct process *to)
{
	int fds[KEPT + 1];
	memcpy(fds, kept, (size_t)nr_kept * sizeof(int));
	fds[nr_kept] = to->wake;
	if (nr_kept && to->pid)
		send_message(to->sock, KEEP, nr_kept, fds, nr_kept + 1);
}

/* Of all children, also of those that a daemon left to us. */
static void reap_children(void)
{
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == server.pid) {
			server.reaped = true;
			server.status = status;
		}
}

/* The connection ends with its last descriptor, and a standby has one too. */
static void end_standby(void)
{
	if (standby.pid)
		kill(standby.pid, SIGKILL);
	process_forget(&standby);
}

static _Noreturn void end_keeper(void)
{
	end_standby();
	_exit(!server.reaped ? 1 : WIFEXITED(server.status) ? WEXITSTATUS(server.status)
	      : 128 + WTERMSIG(server.status));
}

static void take_standby(pid_t pid, int sock)
{
	end_standby();
	if (!process_adopt(&standby, pid, sock))
		return;
	/* At once: the server may die before it serves. */
	pass_kept(&standby);
	send_message(server.sock, STANDBY, (int32_t)pid, NULL, 0);
}

static void handle_message(const struct message *m, int *fds, int count)
{
	if (m->what == KEEP) {
		take_kept(fds, count);
		pass_kept(&standby);
		return;
	}
	if (m->what == STANDBY && count == 1 && m->value > 0) {
		take_standby((pid_t)m->value, fds[0]);
		return;
	}
	while (count)
		close(fds[--count]);
	if (m->what == SERVING) {
		bits = (uint32_t)m->value;
		if (!(bits & WANTS_STANDBY))
			end_standby();
		if (server.serves)
			return;
		server.serves = ever_served = true;
		deaths = 0;
		standby_due = now_ms() + STANDBY_MS;
		if (stop_signal && now_ms() < stop_until)
			kill(server.pid, stop_signal);
	} else if (m->what == ENDING) {
		ending = true;
		end_standby();
		drop_kept();
	}
}

static void hear_server(void)
{
	struct message m;
	int fds[KEPT + 1], count, got;
	while ((got = receive_message(server.sock, &m, fds, &count)) > 0)
		handle_message(&m, fds, count);
	if (got < 0)
		close_fd(&server.sock);
}

static const char *how_it_ended(void)
{
	static char text[64];
	if (!server.reaped)
		return "ended";
	if (WIFSIGNALED(server.status))
		snprintf(text, sizeof(text), "was ended by signal %d", WTERMSIG(server.status));
	else
		snprintf(text, sizeof(text), "ended with status %d", WEXITSTATUS(server.status));
	return text;
}

/* Without serving, and by itself: a SIGKILL from elsewhere says nothing about the next one. */
static void count_death(void)
{
	uint64_t now = now_ms();
	death_at[deaths % DEATHS] = now;
	deaths++;
	if (deaths < DEATHS || now - death_at[deaths % DEATHS] > DEATHS_MS)
		return;
	say("the daemon has ended %d times within a minute without serving: the device is given up, and its data "
	    "is lost; the lines above say why", DEATHS);
	end_keeper();
}

static void replace_server(void)
{
	uint64_t one = 1;
	const char *which = "the standby";
	if (standby.pid && !process_ended(&standby)) {
		process_forget(&server);
		server = standby;
		standby = (struct process){ .sock = -1, .pidfd = -1, .wake = -1 };
		server.since = now_ms();
	} else {
		which = "a new process";
		process_forget(&standby);
		process_forget(&server);
		while (!process_spawn(&server, command)) {
			count_death();
			sleep(1);
		}
		pass_kept(&server);
	}
	if (write(server.wake, &one, sizeof(one)) < 0)
		say("process %d cannot be woken: %s", (int)server.pid, strerror(errno));
	say("%s, process %d, takes over", which, (int)server.pid);
}

static void server_ended(void)
{
	bool by_itself = server.reaped && (blamed || !WIFSIGNALED(server.status)
					   || WTERMSIG(server.status) != SIGKILL);
	hear_server();
	if (ending || !ever_served)
		end_keeper();
	say("the daemon, process %d, %s", (int)server.pid, how_it_ended());
	if (!(bits & SURVIVES) || !nr_kept) {
		say("nothing can take over from it: the device is gone, and its data is lost");
		end_keeper();
	}
	if (!server.serves && by_itself)
		count_death();
	if (page && blame_hands(page, by_itself))
		say("a request was in hand at %d such ends in a row: it is answered with an I/O error", BLAMED);
	memset(&watch, 0, sizeof(watch));
	blamed = false;
	kill_due = 0;
	replace_server();
}

/* Stopped by a signal, or by a debugger. */
static bool server_stands_still(void)
{
	static char text[512];
	char path[32], *at;
	ssize_t got;
	int fd;
	snprintf(path, sizeof(path), "/proc/%d/stat", (int)server.pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	got = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[got > 0 ? got : 0] = 0;
	at = strrchr(text, ')');
	return at && at[1] == ' ' && (at[2] == 'T' || at[2] == 't');
}

static void look_at_hands(uint64_t now)
{
	unsigned int longest;
	if (kill_due && now >= kill_due) {
		blamed = true;
		kill_due = 0;
		kill(server.pid, SIGKILL);
	}
	if (!server.serves && ever_served && !ending && now - server.since > START_MS && !server_stands_still()) {
		say("process %d has not served within %d s, and is ended", (int)server.pid, START_MS / 1000);
		kill(server.pid, SIGKILL);
		server.since = now;
	}
	if (now < look_due)
		return;
	look_due = now + look_ms;
	if (!page || !server.serves || !(bits & SURVIVES) || kill_due)
		return;
	longest = watch_hands(&watch, page);
	if (longest && server_stands_still())
		memset(&watch, 0, sizeof(watch));
	if (longest < LOOKS || server_stands_still())
		return;
	say("the daemon, process %d, has worked on one request for %llu s: its stacks follow, then it is ended",
	    (int)server.pid, (unsigned long long)(look_ms * LOOKS / 1000));
	kill(server.pid, SIGUSR1);
	kill_due = now + STACKS_MS;
}

static void renew_standby(uint64_t now)
{
	if (process_ended(&standby)) {
		say("the standby, process %d, has ended", (int)standby.pid);
		standby_pause = now - standby.since < STANDBY_MOST_MS && standby_pause < STANDBY_MOST_MS
			? standby_pause * 2 : STANDBY_MS;
		standby_due = now + standby_pause;
		process_forget(&standby);
		send_message(server.sock, STANDBY, 0, NULL, 0);
	}
	if (standby.pid || !server.serves || !(bits & WANTS_STANDBY) || !(bits & SURVIVES) || ending
	    || now < standby_due)
		return;
	standby_due = now + standby_pause;
	if (process_spawn(&standby, command)) {
		pass_kept(&standby);
		send_message(server.sock, STANDBY, (int32_t)standby.pid, NULL, 0);
	}
}

static void handle_signal(int number)
{
	if (number == SIGCHLD)
		return;
	stop_signal = number;
	stop_until = now_ms() + START_MS;
	/* One that is about to take over would end at once, and with it whatever is in swap. */
	if (server.serves || !ever_served)
		kill(server.pid, number);
}

static _Noreturn void keep_device(int signals)
{
	struct signalfd_siginfo seen;
	for (;;) {
		struct pollfd wait[] = {
			{ .fd = signals, .events = POLLIN }, { .fd = server.sock, .events = POLLIN },
			{ .fd = server.pidfd, .events = POLLIN }, { .fd = standby.pidfd, .events = POLLIN },
		};
		uint64_t now = now_ms(), until = look_due;
		if (kill_due && kill_due < until)
			until = kill_due;
		if (!standby.pid && server.serves && (bits & WANTS_STANDBY) && standby_due < until)
			until = standby_due;
		poll(wait, 4, until > now ? (int)(until - now) + 1 : 0);
		while (read(signals, &seen, sizeof(seen)) == sizeof(seen))
			handle_signal((int)seen.ssi_signo);
		hear_server();
		/* The end first, then the status: no end is without one. */
		if (process_ended(&server)) {
			reap_children();
			server_ended();
			continue;
		}
		reap_children();
		now = now_ms();
		look_at_hands(now);
		renew_standby(now);
	}
}

static void touch_memory(void)
{
	extern char __executable_start, __data_start, _end;
	volatile char stack[STACK];
	volatile char *at;
	for (at = &__executable_start; at < &__data_start; at += PAGE)
		(void)*at;
	for (at = &__data_start; at < &_end; at += PAGE)
		*at = *at;
	for (at = stack; at < stack + STACK; at += PAGE)
		*at = 0;
}

static void protect_process(const char *rundir)
{
	struct tm tm;
	time_t now = time(NULL);
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (write(fd, "-1000", 5) < 0 && errno != EACCES)
			say("oom_score_adj: %s", strerror(errno));
		close(fd);
	}
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	prctl(PR_SET_NAME, "zramfs-keeper", 0, 0, 0);
	if (localtime_r(&now, &tm))
		zone = tm.tm_gmtoff;
	/* The descriptor stays: by the lock others know that somebody serves. */
	fd = open(rundir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || flock(fd, LOCK_SH))
		say("%s cannot be locked: %s", rundir, strerror(errno));
	/* Not MCL_CURRENT alone: it makes heap and stack resident that are never used, 0.3 MiB. */
	if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		say("the memory of the keeper is not locked: %s", strerror(errno));
	touch_memory();
}

int main(int argc, char **argv)
{
	static const int taken[] = { SIGCHLD, SIGTERM, SIGINT, SIGHUP };
	sigset_t mask;
	int signals;
	if (argc < 6) {
		say("expected SOCKET PID RUNDIR HANG_MS COMMAND...; it is started by zramfs itself");
		return 2;
	}
	process_forget(&server);
	process_forget(&standby);
	command = argv + 5;
	look_ms = strtoull(argv[4], NULL, 10) / LOOKS;
	look_ms = look_ms < 10 ? 10 : look_ms;
	fcntl(atoi(argv[1]), F_SETFD, FD_CLOEXEC);
	sigemptyset(&mask);
	for (size_t i = 0; i < sizeof(taken) / sizeof(taken[0]); i++)
		sigaddset(&mask, taken[i]);
	sigprocmask(SIG_SETMASK, &mask, NULL);
	signals = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
	protect_process(argv[3]);
	if (signals < 0 || !process_adopt(&server, (pid_t)atoi(argv[2]), atoi(argv[1])))
		return 1;
	send_message(server.sock, HELLO, (int32_t)getpid(), NULL, 0);
	keep_device(signals);
}
