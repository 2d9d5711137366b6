/* SPDX-License-Identifier: Apache-2.0
 * The keeper of a device: holds the descriptors that must outlive its daemon, and starts the next daemon
 * when one ends. It knows nothing of what they hold.
 *
 *   zramfs-keeper SOCKET[:PIDFD:BITS:FD...] PID[:WAY_BACK:STANDBY:SOCKET] RUNDIR HANG_MS COMMAND...
 *
 * SOCKET: its end of a socket pair to the daemon, process PID, which serves or is about to. PIDFD to FD:
 * what another version of this program has left in this very process: the daemon's pidfd, the last SERVING, and
 * what is kept. WAY_BACK: words of that version, which this process becomes again when its own daemon ends
 * before it serves, or by its own fault within a minute. STANDBY: of that version. Its files may be gone by
 * then, but it is loaded, so it waits until the minute is over, too. RUNDIR: locked as long as the keeper lives.
 * HANG_MS: a request in hand for longer ends the daemon. COMMAND: starts another daemon, which finds its socket
 * as descriptor 3.
 *
 * The next daemon begins when nobody writes to the memory any more: when the last thread of the old one is gone,
 * which its pidfd tells, or before, as soon as all its threads are past their last instruction (fence.h). What a
 * daemon has said before that is still read.
 *
 * All memory is taken and locked at the start. OOM score and PR_SET_IO_FLUSHER are those of who starts it. */
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

#include "another_program.h"
#include "fence.h"

enum {
	LOOKS = 6,		/* at the requests in hand, within HANG_MS; stacks are written before the last */
	DEATHS = 5,		/* without serving, within DEATHS_MS: the device ends */
	DEATHS_MS = 60000,
	START_MS = 120000,	/* a start that takes longer has failed; */
	STARTS = 4,		/* of a standby, so many times HANG_MS */
	STANDBY_MS = 200,	/* pause before a standby is started: the takeover comes first */
	STANDBY_MOST_MS = 60000,
	ENDS_MS = 1,		/* pause between looks at a daemon that ends */
	STACK = 32768,		/* bytes that are made resident */
};

static struct process server, standby, old_standby;
static bool server_ends;	/* one of its threads has ended, and the others are about to */
static int predecessor = -1;	/* pidfd of one that still gives its memory back */
static uint32_t bits;		/* of the last SERVING */
static bool ever_served, ending, hung;
static int stop_signal;
static uint64_t stop_until;	/* a signal that was refused is forgotten then */
static uint64_t first_death;	/* of a row without serving, */
static unsigned int deaths;	/* which is so long */
static uint64_t standby_due, standby_pause = STANDBY_MS, look_ms, look_due;
static char **own_words, **command;
static bool replaced;		/* a daemon of another keeper, by one of this */

/* The descriptors for a process that is to take over at once or later. */
static void pass_kept(struct process *to)
{
	int fds[KEPT + 1];
	memcpy(fds, kept, (size_t)nr_kept * sizeof(int));
	fds[nr_kept] = to->wake;
	if (nr_kept && to->pid)
		send_message(to->sock, KEEP, nr_kept, fds, nr_kept + 1);
}

/* Of all children, also of those that a daemon left to us. Without haste: the kernel turns in circles here until
 * the threads of the child, which have no haste, have left /proc (190 ms a death on busy CPUs). */
static void reap_children(void)
{
	siginfo_t info = { 0 };
	int status, pid;
	if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) || !info.si_pid)
		return;
	make_haste(false);
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == server.pid) {
			server.has_status = true;
			server.status = status;
		}
	make_haste(true);
}

/* How the server has ended, which is reaped later: its successor comes first. */
static void note_status(void)
{
	siginfo_t info = { 0 };
	if (server.has_status || waitid(P_PID, (id_t)server.pid, &info, WEXITED | WNOHANG | WNOWAIT)
	    || !info.si_pid)
		return;
	server.has_status = true;
	server.status = info.si_code == CLD_EXITED ? info.si_status << 8 : info.si_status;
}

/* The connection ends with its last descriptor, and a standby has one too. */
static void end_standbys(void)
{
	process_end(&standby);
	process_end(&old_standby);
}

static _Noreturn void end_keeper(void)
{
	end_standbys();
	_exit(!server.has_status ? 1 : WIFEXITED(server.status) ? WEXITSTATUS(server.status)
	      : 128 + WTERMSIG(server.status));
}

static void take_standby(pid_t pid, int sock)
{
	process_end(&standby);
	if (!process_adopt(&standby, pid, sock, -1))
		return;
	standby.is_ready = true;
	/* At once: the server may die before it serves. */
	pass_kept(&standby);
	send_message(server.sock, STANDBY, (int32_t)pid, NULL, 0);
}

/* A standby of the version that there is a way back to goes along, in either direction. */
static int run_another_program(int words_fd)
{
	int error;
	if (!old_standby.pid && way_back >= 0 && standby.is_ready) {
		old_standby = standby;
		standby = NO_PROCESS;
	}
	process_end(&standby);
	send_message(server.sock, STANDBY, 0, NULL, 0);
	error = become_program(words_fd, &server, &old_standby, bits, own_words);
	process_end(&old_standby);
	return error;
}

/* From a daemon that has ended the next one takes over, of the version that is known to work. */
static void obey_upgrade(int words_fd)
{
	bool may = server.serves && !process_ended(&server) && !ending;
	int error = may ? run_another_program(words_fd) : EAGAIN;
	send_message(server.sock, UPGRADE, error, NULL, 0);
}

/* The version before replaces the daemon that has ended as it would one of its own. */
static void go_back_a_version(void)
{
	int words_fd = way_back;
	way_back = -1;
	say("this version does not hold: the one before takes over again");
	run_another_program(words_fd);
	close(words_fd);
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
	if (m->what == UPGRADE && count == 1)
		obey_upgrade(fds[0]);
	if (m->what == WAY_BACK) {
		close_fd(&way_back);
		way_back = count ? fds[--count] : -1;
	}
	while (count)
		close(fds[--count]);
	if (m->what == SERVING && !server.serves) {
		server.serves = ever_served = true;
		deaths = 0;
		standby_due = now_ms() + STANDBY_MS;
		if (stop_signal && now_ms() < stop_until)
			kill(server.pid, stop_signal);
	}
	if (m->what == SERVING) {
		process_watch_threads(&server);
		bits = (uint32_t)m->value;
		if (!(bits & WANTS_STANDBY))
			process_end(&standby);
	} else if (m->what == ENDING) {
		ending = true;
		end_standbys();
		drop_kept();
	}
}

/* What a process has said. A standby says that it is ready. */
static void hear_process(struct process *from)
{
	struct message m;
	int fds[KEPT + 1], count, got;
	while ((got = receive_message(from->sock, &m, fds, &count)) > 0)
		if (from == &server)
			handle_message(&m, fds, count);
		else if (!from->is_ready) {
			from->is_ready = true;
			send_message(server.sock, STANDBY, (int32_t)from->pid, NULL, 0);
		}
	if (got < 0)
		close_fd(&from->sock);
}

/* Without serving, and by itself: a SIGKILL from elsewhere says nothing about the next one. */
static void count_death(void)
{
	uint64_t now = now_ms();
	if (now - first_death > DEATHS_MS)
		deaths = 0;
	if (!deaths++)
		first_death = now;
	if (deaths < DEATHS) {
		/* The files of a new version may be put into their place right now, which takes dpkg seconds: 0, 5, 10
		 * and 15 s. A standby needs none of them. */
		if (!standby.is_ready)
			poll(NULL, 0, (int)((deaths - 1) * look_ms));
		return;
	}
	say("the daemon has ended %d times within a minute without serving: the device is given up, and its data "
	    "is lost; the lines above say why", DEATHS);
	end_keeper();
}

/* A standby that is not ready does not count: a page that it has yet to lock may be in the swap that nobody
 * serves now. */
static void replace_server(void)
{
	uint64_t one = 1;
	const char *which = "the standby";
	hear_process(&standby);
	replaced = true;
	close_fd(&predecessor);
	predecessor = server.pidfd;
	server.pidfd = -1;
	process_forget(&server);
	if (standby.is_ready && !process_ended(&standby)) {
		server = standby;
		standby = NO_PROCESS;
		server.since = now_ms();
	} else {
		which = "a new process";
		process_end(&standby);
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
	bool killed = server.has_status && WIFSIGNALED(server.status);
	/* A SIGKILL from elsewhere says nothing about a request, or about the next daemon. */
	bool by_itself = hung || !killed || WTERMSIG(server.status) != SIGKILL;
	hear_process(&server);
	if (ending || !ever_served)
		end_keeper();
	say("the daemon, process %d, %s %d", (int)server.pid, killed ? "was ended by signal" : "ended with status",
	    killed ? WTERMSIG(server.status) : server.has_status ? WEXITSTATUS(server.status) : -1);
	if (!(bits & SURVIVES) || !nr_kept) {
		say("nothing can take over from it: the device is gone, and its data is lost");
		end_keeper();
	}
	if (replaced && way_back >= 0 && (by_itself || !server.serves))
		go_back_a_version();
	if (!server.serves && by_itself)
		count_death();
	if (page && by_itself)
		page->own_ends++;
	forget_hands();
	hung = false;
	replace_server();
}

static void watch_server(uint64_t now)
{
	unsigned int longest;
	bool starts = !server.serves && ever_served && !ending;
	if (now < look_due)
		return;
	look_due = now + look_ms;
	if (server.serves)
		process_watch_threads(&server);
	if (server.serves && replaced && now - server.since >= DEATHS_MS) {
		close_fd(&way_back);
		process_end(&old_standby);
	}
	if (starts && now - server.since > START_MS && !process_stands_still(&server)) {
		say("process %d has not served within %d s, and is ended", (int)server.pid, START_MS / 1000);
		kill(server.pid, SIGKILL);
		server.since = now;
	}
	if (!page || !server.serves || !(bits & SURVIVES))
		return;
	longest = look_at_hands();
	if (longest >= LOOKS - 1 && process_stands_still(&server))
		forget_hands();
	else if (longest == LOOKS - 1) {
		say("the daemon, process %d, has worked on one request for %llu s: its stacks follow",
		    (int)server.pid, (unsigned long long)(look_ms * longest / 1000));
		kill(server.pid, SIGUSR1);
	} else if (longest >= LOOKS) {
		say("it hangs, and is ended");
		hung = true;
		kill(server.pid, SIGKILL);
	}
}

static bool lacks_standby(void)
{
	return !standby.pid && server.serves && !ending && bits == (SURVIVES | WANTS_STANDBY);
}

static void renew_standby(uint64_t now)
{
	if (standby.pid && !standby.is_ready && now - standby.since > STARTS * LOOKS * look_ms) {
		say("the standby, process %d, has not become ready, and is ended", (int)standby.pid);
		kill(standby.pid, SIGKILL);
		standby.since = now;
	}
	if (process_ended(&standby)) {
		say("the standby, process %d, has ended", (int)standby.pid);
		standby_pause = now - standby.since < STANDBY_MOST_MS && standby_pause < STANDBY_MOST_MS
			? standby_pause * 2 : STANDBY_MS;
		standby_due = now + standby_pause;
		process_forget(&standby);
		send_message(server.sock, STANDBY, 0, NULL, 0);
	}
	if (!lacks_standby() || now < standby_due)
		return;
	standby_due = now + standby_pause;
	if (process_spawn(&standby, command))
		pass_kept(&standby);
}

static void handle_signal(int number)
{
	stop_signal = number;
	stop_until = now_ms() + START_MS;
	/* One that is about to take over would end at once, and with it whatever is in swap. */
	if (server.serves || !ever_served)
		kill(server.pid, number);
}

/* Whether somebody else may take over. */
static bool server_is_past(void)
{
	if (process_ended(&server)) {
		/* The end first, then the status: no end is without one. */
		note_status();
		return true;
	}
	server_ends = process_ends(&server) || (server_ends && process_may_end(&server));
	/* Where nobody takes over, whoever waits for the end of the device waits for its memory as well. */
	return server_ends && !ending && server.serves && bits & SURVIVES && process_is_past(&server);
}

static void wait_for_events(int signals)
{
	struct pollfd wait[8 + WATCHED] = {
		{ .fd = signals, .events = POLLIN }, { .fd = server.sock, .events = POLLIN },
		{ .fd = server.pidfd, .events = POLLIN }, { .fd = standby.pidfd, .events = POLLIN },
		{ .fd = standby.sock, .events = POLLIN }, { .fd = predecessor, .events = POLLIN },
	};
	nfds_t count = 6;
	for (int i = 0; i < server.watched; i++)
		wait[count++] = (struct pollfd){ .fd = server.threads[i], .events = POLLIN };
	poll(wait, count, server_ends ? ENDS_MS : lacks_standby() ? STANDBY_MS / 2 : (int)look_ms);
	if (wait[5].revents)
		close_fd(&predecessor);
}

static _Noreturn void keep_device(int signals)
{
	struct signalfd_siginfo info;
	for (;;) {
		wait_for_events(signals);
		while (read(signals, &info, sizeof(info)) == sizeof(info))
			handle_signal((int)info.ssi_signo);
		hear_process(&server);
		hear_process(&standby);
		if (server_is_past()) {
			server_ends = false;
			server_ended();
			continue;
		}
		reap_children();
		watch_server(now_ms());
		renew_standby(now_ms());
	}
}

static void touch_memory(void)
{
	extern char __executable_start, _end;
	char stack[STACK] = "";
	mlock(&__executable_start, (size_t)(&_end - &__executable_start));
	mlock(stack, sizeof(stack));
}

static void protect_process(const char *rundir)
{
	int fd = open(rundir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	make_haste(true);
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	prctl(PR_SET_NAME, "zramfs-keeper", 0, 0, 0);
	tzset();
	/* The descriptor stays: by the lock others know that somebody serves. */
	if (fd < 0 || flock(fd, LOCK_SH))
		say("%s cannot be locked: %s", rundir, strerror(errno));
	/* Only what is touched: heap and stack that are never used would take 0.3 MiB. */
	if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		say("the memory of the keeper is not locked: %s", strerror(errno));
	touch_memory();
}

int main(int argc, char **argv)
{
	sigset_t mask;
	int signals;
	if (argc < OURS + 1) {
		say("expected SOCKET PID RUNDIR HANG_MS COMMAND...; it is started by zramfs itself");
		return 2;
	}
	server = standby = old_standby = NO_PROCESS;
	own_words = argv;
	command = argv + OURS;
	look_ms = strtoull(argv[4], NULL, 10) / LOOKS;
	sigemptyset(&mask);
	sigaddset(&mask, SIGTERM);
	sigaddset(&mask, SIGINT);
	sigaddset(&mask, SIGHUP);
	sigprocmask(SIG_SETMASK, &mask, NULL);
	fence_try();
	signals = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
	protect_process(argv[3]);
	if (signals < 0 || !take_words(argv, &server, &standby, &old_standby, &bits))
		return 1;
	pass_kept(&standby);
	if (old_standby.pid) /* nothing is kept for it: orphaned, it must not take over beside the other standby */
		send_message(old_standby.sock, KEEP, 0, &old_standby.wake, 1);
	ever_served = server.serves;
	send_message(server.sock, HELLO, (int32_t)getpid(), NULL, 0);
	if (standby.pid)
		send_message(server.sock, STANDBY, (int32_t)standby.pid, NULL, 0);
	keep_device(signals);
}
