//! Why a connection is on TCP: every "no" that libsmc says has a reason, a number and a remedy.
//!
//! Where Linux's `net/smc` has a code of the same meaning (`smc_clc.h`; `smcss` and `smcr stats` print them)
//! the number is the kernel's. The rest are ours, in `0x7f00_0000..`, which the kernel does not use.
//! The number travels in the CLC Decline; the name is what `smc ss --json` and `SMC_STATS` show.

macro_rules! reasons {
    ($($(#[$doc:meta])* $id:ident = $code:literal, $name:literal, $explain:literal;)*) => {
        /// Why a connection stays on TCP, went back to it, or why a handshake ended.
        ///
        /// ```
        /// use smc::reason::Reason;
        ///
        /// assert_eq!(Reason::PeerNoSmc.to_string(), "peer-no-smc");
        /// assert_eq!(Reason::try_from(0x0301_0000), Ok(Reason::PeerNoSmc));
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[non_exhaustive]
        pub enum Reason {
            $(#[doc = $explain] $(#[$doc])* $id = $code,)*
        }

        impl Reason {
            /// Every reason, in the order of the table.
            ///
            /// ```
            /// for reason in smc::reason::Reason::ALL {
            ///     println!("{reason}: {}", reason.explain());
            /// }
            /// ```
            pub const ALL: &[Reason] = &[$(Reason::$id,)*];

            /// Short name: lower case, words joined by `-`. A contract: it appears in JSON.
            ///
            /// ```
            /// assert_eq!(smc::reason::Reason::ForkShared.name(), "fork-shared");
            /// ```
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$id => $name,)* }
            }

            /// One sentence: what happened, and what to do where something can be done.
            ///
            /// ```
            /// assert!(smc::reason::Reason::NoMemory.explain().contains("SMC_MEM_LIMIT"));
            /// ```
            #[must_use]
            pub const fn explain(self) -> &'static str {
                match self { $(Reason::$id => $explain,)* }
            }
        }

        impl TryFrom<u32> for Reason {
            type Error = u32;

            /// The reason with this code; a code that is not in the table comes back.
            fn try_from(code: u32) -> Result<Self, u32> {
                match code { $($code => Ok(Reason::$id),)* other => Err(other) }
            }
        }
    };
}

reasons! {
    // Codes of net/smc.
    NoMemory = 0x0101_0000, "no-memory",
        "No memory for the ring buffers; raise SMC_MEM_LIMIT or lower SMC_RMB_SIZE.";
    PeerNoSmc = 0x0301_0000, "peer-no-smc",
        "The peer did not answer as an SMC peer; start it under libsmc (`smc run`) as well.";
    SocketOption = 0x0306_0000, "socket-option",
        "A socket option is set that the ring can't honour (TCP Fast Open, for instance); leave it out to be upgraded.";
    VersionMismatch = 0x030c_0000, "version-mismatch",
        "The two ends run versions of libsmc that do not fit together; install the same version for both.";
    OutOfSync = 0x0400_0000, "out-of-sync",
        "The ends disagree about their link group; the next connection builds a new one.";
    PeerDeclined = 0x0500_0000, "peer-declined",
        "The peer declined; its own `smc ss` shows why.";
    Internal = 0x0999_0000, "internal",
        "The kernel refused something it should not have; SMC_LOG=debug says what; please report it.";

    // Ours.
    NoRdma = 0x7f00_0020, "no-rdma",
        "The peer speaks SMC, but RDMA can't be used here; `smc check` says what is missing.";
    NotLocal = 0x7f00_0001, "not-local",
        "The other end is not in this network namespace, so memory can't be shared with it.";
    NoFds = 0x7f00_0002, "no-fds",
        "No file descriptor was free for the doorbell; raise the limit (ulimit -n).";
    UidMismatch = 0x7f00_0003, "uid-mismatch",
        "The process behind the doorbell does not run as the owner of the TCP connection's other end.";
    ForkShared = 0x7f00_0004, "fork-shared",
        "Another process holds the same socket since a fork; close it in the process that does not use it.";
    Exec = 0x7f00_0005, "exec",
        "The socket survives an exec, so the stream went back to TCP; set close-on-exec where it is not meant to.";
    CountMismatch = 0x7f00_0006, "count-mismatch",
        "Bytes are moved, or waited for, by a way that libsmc does not see, so the stream can't be switched.";
    TooShort = 0x7f00_0007, "too-short",
        "The connection ended before it reached SMC_UPGRADE_AFTER; lower that to upgrade sooner.";
    Stdio = 0x7f00_0008, "stdio",
        "The C library's stdio uses the socket and is not seen by libsmc.";
    LowFd = 0x7f00_0009, "low-fd",
        "The socket is standard input, output or error, which other programs inherit.";
    Disabled = 0x7f00_000a, "disabled",
        "libsmc is switched off (SMC_DISABLE).";
    Excluded = 0x7f00_000b, "excluded",
        "SMC_ONLY or SMC_EXCLUDE leaves this connection out.";
    Zerocopy = 0x7f00_000c, "zerocopy",
        "The program sends with MSG_ZEROCOPY, which only the kernel can complete.";
    Ulp = 0x7f00_000d, "ulp",
        "An upper-layer protocol (kernel TLS, for instance) is attached to the socket.";
    Urgent = 0x7f00_000e, "urgent",
        "The program uses urgent (out-of-band) data, which has its place in the TCP stream.";
    Splice = 0x7f00_000f, "splice",
        "The program moves the data inside the kernel (splice, sendfile), so it stays there.";
    AsyncIo = 0x7f00_0010, "async-io",
        "The program uses io_uring, POSIX AIO or O_ASYNC on the socket, which libsmc can't follow.";
    PeerMisbehaved = 0x7f00_0011, "peer-misbehaved",
        "The peer sent something no correct peer sends; compare the versions of libsmc on both ends.";
    PeerGone = 0x7f00_0012, "peer-gone",
        "The peer went away before the connection could be upgraded.";
    TooManyTries = 0x7f00_0013, "too-many-tries",
        "The peer did not finish the handshake within the tries it is given; it may not call the socket often enough.";
    HandshakeFailed = 0x7f00_0014, "handshake-failed",
        "The handshake failed for a reason that has no better name; SMC_LOG=debug says more.";
    ConnectionToSelf = 0x7f00_0015, "connection-to-self",
        "The socket is connected to itself (TCP simultaneous open on one port).";
    Terminated = 0x7f00_0016, "terminated",
        "The link group was terminated; new connections build a new one.";
    FdPassed = 0x7f00_0017, "fd-passed",
        "The socket was handed to another process (SCM_RIGHTS), so the stream went back to TCP.";
    Sandbox = 0x7f00_0018, "sandbox",
        "The program entered a seccomp sandbox, so the stream went back to TCP first.";
    NameTaken = 0x7f00_0019, "name-taken",
        "Somebody else holds the rendezvous name of this connection; `ss -xl` shows who.";
    NoSockDiag = 0x7f00_001a, "no-sock-diag",
        "The kernel does not say who owns the other end (sock_diag); load the modules inet_diag and tcp_diag.";
    Stalled = 0x7f00_001b, "stalled",
        "Both ends wrote more than the ring holds before either read, so the stream went to TCP's larger buffers; raise SMC_RMB_SIZE.";
    AskedFor = 0x7f00_001c, "asked-for",
        "The program asked for the TCP socket itself (`smc::net::Stream::into_tcp`), so the stream went back to TCP.";
}

impl Reason {
    /// The number: the kernel's where the meaning is the same.
    ///
    /// ```
    /// assert_eq!(smc::reason::Reason::NoMemory.code(), 0x0101_0000);
    /// ```
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_and_codes_are_unique_and_come_back() {
        let mut names = HashSet::new();
        for &r in Reason::ALL {
            assert_eq!(Reason::try_from(r.code()), Ok(r));
            assert!(names.insert(r.name()), "{} twice", r.name());
            assert!(r.name().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            assert!(r.explain().ends_with('.'));
        }
        assert_eq!(Reason::try_from(1), Err(1));
    }

    #[test]
    fn kernel_codes() {
        assert_eq!(Reason::PeerNoSmc.code(), 0x0301_0000);
        assert_eq!(Reason::PeerDeclined.code(), 0x0500_0000);
    }
}
