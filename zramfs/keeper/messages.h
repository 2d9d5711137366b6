/* SPDX-License-Identifier: Apache-2.0
 * What the keeper and a daemon say to each other: one packet, with descriptors beside it. client.py has the
 * same numbers, and a version of these, of kept_page.h as far as the keeper reads it, and of the keeper's words:
 * `zramfs upgrade` puts the keeper of one version beside the daemon of another. */
#ifndef ZRAMFS_KEEPER_MESSAGES_H
#define ZRAMFS_KEEPER_MESSAGES_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

enum {
	KEEP = 1,	/* daemon: these descriptors, in place of the last ones; keeper: the same, and behind
			 * them an eventfd that is readable when it is the receiver's turn */
	SERVING,	/* daemon: it serves; value: the bits below. May come again */
	ENDING,		/* daemon: it ends for good, and nobody is to take over */
	STANDBY,	/* daemon: process `value` waits, ready, at the socket that comes along; standby: it is
			 * ready; keeper: the standby is this one, 0 = there is none */
	HELLO,		/* keeper: it is there, and its pid is `value` */
	UPGRADE,	/* daemon: become another program, in the same process; a descriptor with its words: the
			 * program and COMMAND, each with a NUL behind it. HELLO is the answer; keeper: that
			 * has failed with the errno `value`, and it goes on */
	WAY_BACK,	/* daemon: a descriptor with words as of UPGRADE, which another program is to become again
			 * when its own daemon does not hold; none: it is not to. An older keeper ignores it */
};
enum { SURVIVES = 1, WANTS_STANDBY = 2 };	/* bits of SERVING */
enum { KEPT = 8 };				/* descriptors at most */
#define FD_ROOM(name) _Alignas(struct cmsghdr) char name[CMSG_SPACE((KEPT + 1) * sizeof(int))]

struct message {
	uint32_t what;
	int32_t value;
};

/* 0 or an errno. */
static int send_message(int sock, uint32_t what, int32_t value, const int *fds, int count)
{
	struct message m = { what, value };
	struct iovec io = { &m, sizeof(m) };
	FD_ROOM(control) = { 0 };
	struct msghdr h = { .msg_iov = &io, .msg_iovlen = 1 };
	struct cmsghdr *c = (struct cmsghdr *)control;
	if (count) {
		h.msg_control = control;
		h.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
		memcpy(CMSG_DATA(c), fds, (size_t)count * sizeof(int));
	}
	return sendmsg(sock, &h, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? errno : 0;
}

/* 1: a message; 0: there is none; -1: there will be none. fds: room for KEPT + 1. */
static int receive_message(int sock, struct message *m, int *fds, int *count)
{
	struct iovec io = { m, sizeof(*m) };
	FD_ROOM(control);
	struct msghdr h = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = control,
			    .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	ssize_t got = sock < 0 ? 0 : recvmsg(sock, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	*count = 0;
	if (got <= 0)
		return got < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
	c = CMSG_FIRSTHDR(&h);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
		*count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)*count * sizeof(int));
	}
	if (got != sizeof(*m))
		m->what = 0;
	return 1;
}

#endif
