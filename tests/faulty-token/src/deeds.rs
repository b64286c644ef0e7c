//! Deeds: harm that a module does to the process that loaded it.

use std::hint::black_box;
use std::io::Write;

/// Number of bytes that `leak` leaks and `print` prints.
const GIGABYTE: usize = 1 << 30;
/// Length of a printed line.
const LINE: usize = 1000;
const LINES: usize = 64;
/// The descriptor that [`Deed::Close`] and [`Deed::Reconnect`] take: a worker process has its socket there.
const DESCRIPTOR: libc::c_int = 3;
/// The size that [`Deed::Heap`] writes over the size of a block. It is smaller than any block.
const NO_SIZE: usize = 8;

/// A deed, as described in the documentation of the crate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Deed {
    Abort,
    Exit,
    Segv,
    Heap,
    Handlers,
    Close,
    Reconnect,
    Print,
    Leak,
    Deadlock,
}

impl Deed {
    const ALL: [(&'static str, Deed); 10] = [
        ("abort", Deed::Abort),
        ("exit", Deed::Exit),
        ("segv", Deed::Segv),
        ("heap", Deed::Heap),
        ("handlers", Deed::Handlers),
        ("close", Deed::Close),
        ("reconnect", Deed::Reconnect),
        ("print", Deed::Print),
        ("leak", Deed::Leak),
        ("deadlock", Deed::Deadlock),
    ];

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, deed)| *deed)
    }

    /// Does it. Returns if the process is still there, and this thread with it.
    #[expect(clippy::disallowed_methods, reason = "a library that ends its process is a fault to inject")]
    pub(crate) fn perform(self) {
        match self {
            Deed::Abort => std::process::abort(),
            Deed::Exit => std::process::exit(0),
            Deed::Segv => raise_segv(),
            Deed::Heap => corrupt_heap(),
            Deed::Handlers => change_handlers(),
            // SAFETY: the purpose is to take a descriptor from its owner. Later reads and writes of the owner fail, or go
            // to a file that gets the same number; both are memory safe.
            Deed::Close => drop(unsafe { libc::close(DESCRIPTOR) }),
            Deed::Reconnect => reconnect(),
            Deed::Print => print(),
            Deed::Leak => std::mem::forget(black_box(vec![1_u8; GIGABYTE])),
            Deed::Deadlock => lock_twice(),
        }
    }
}

/// Raises SIGSEGV twice. Rust's default handler takes the first signal for a fault that will recur: it restores the default
/// action and returns.
fn raise_segv() {
    for _ in 0..2 {
        // SAFETY: sending a signal to the own thread touches no memory.
        unsafe { libc::raise(libc::SIGSEGV) };
    }
}

/// Corrupts the allocator's data. The check in `free` then aborts the process.
fn corrupt_heap() {
    // SAFETY: this is undefined behaviour on purpose: it overwrites the size in front of a block. Only this function uses
    // the block, and glibc, on which the tests run, ends the process before it uses that size.
    unsafe {
        let block = libc::malloc(64).cast::<usize>();
        block.sub(1).write(NO_SIZE);
        libc::free(block.cast());
    }
}

/// Acts like a library that closes a foreign descriptor and then opens a connection of its own, whose other end is read.
fn reconnect() {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both ends. The closed descriptor's owner sends to another socket from now on, which is
    // memory safe.
    unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, ends.as_mut_ptr());
        libc::dup2(ends[0], DESCRIPTOR);
    }
}

extern "C" fn nothing(_signal: libc::c_int) {}

fn change_handlers() {
    let nothing: extern "C" fn(libc::c_int) = nothing;
    for (signal, handler) in [
        (libc::SIGTERM, libc::SIG_IGN),
        (libc::SIGINT, libc::SIG_IGN),
        (libc::SIGCHLD, libc::SIG_IGN),
        (libc::SIGSEGV, nothing as libc::sighandler_t),
    ] {
        // SAFETY: both handlers may be called at any time.
        unsafe { libc::signal(signal, handler) };
    }
}

/// Prints half of the bytes to each output. Ignores errors of outputs that nobody reads or that are closed.
fn print() {
    let mut line = [b'x'; LINE];
    line[LINE - 1] = b'\n';
    let block = line.repeat(LINES);
    for _ in 0..GIGABYTE / 2 / block.len() + 1 {
        let _ = std::io::stdout().write_all(&block);
        let _ = std::io::stderr().write_all(&block);
    }
}

/// Never returns: a mutex of the default kind waits even for its own owner.
fn lock_twice() {
    let mutex = Box::into_raw(Box::new(libc::PTHREAD_MUTEX_INITIALIZER));
    for _ in 0..2 {
        // SAFETY: the mutex is initialised and never freed.
        unsafe { libc::pthread_mutex_lock(mutex) };
    }
}
