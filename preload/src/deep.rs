//! Libraries that the loader has bound past us.
//!
//! Preloading works because the loader looks a name up in the program's scope, where we come before libc. A
//! library loaded with RTLD_DEEPBIND (PHP loads its extensions so) is looked up in its own scope first, where
//! libc is. Its `recv` is libc's, and would read from TCP what is in the ring. Each new library is therefore
//! looked through, and a slot of its global offset table that names one of our hooks, and leads to libc, is led
//! to us: that is where the loader leads it in every other library.
//!
//! That is done when dlopen(3) returns, still in the thread that called it. Where dlopen must see who called it
//! (it searches by the caller's own paths) it is not called by us, but jumped to, and libraries are looked
//! through when a connection next begins or switches. No other process has its libraries looked through: it takes
//! the loader's lock, which the child of a fork finds locked for ever if another thread had it at the fork.
//! The states of a slot:
//!
//! | slot | meaning | then |
//! | --- | --- | --- |
//! | within libc | bound past us | led to us |
//! | within its own library, which wants it from libc | bound at the first call | led to us, if nobody comes before us |
//! | less than the size of its library | another thread is in dlopen | the library is looked at again later |
//! | any other | bound to us, or to a library that comes before us | left alone |
//!
//! The loader's own lock keeps libraries loaded while they are looked through. No symbol is looked up
//! meanwhile: dlsym takes the loader's other lock, which dlopen takes first.

use crate::real::{entry, real};
use engine::lock;
use engine::reason::Reason;
use libc::{c_char, c_int, c_void, dl_phdr_info, iovec, size_t};
use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};

#[cfg(target_arch = "x86_64")]
const BOUND: [u32; 2] = [6, 7]; // R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT
#[cfg(target_arch = "aarch64")]
const BOUND: [u32; 2] = [1025, 1026]; // R_AARCH64_GLOB_DAT, R_AARCH64_JUMP_SLOT

/// STT_FUNC.
const FUNCTION: u8 = 2;

/// Tags of the dynamic section (elf.h).
mod tag {
    pub const PLT_SIZE: i64 = 2;
    pub const STRINGS: i64 = 5;
    pub const SYMBOLS: i64 = 6;
    pub const RELA: i64 = 7;
    pub const RELA_SIZE: i64 = 8;
    pub const PLT: i64 = 23;
    pub const GNU_HASH: i64 = 0x6fff_fef5;
    pub const VERSIONS: i64 = 0x6fff_fff0;
    pub const NEEDED: i64 = 0x6fff_fffe;
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Rela {
    offset: usize,
    info: u64,
    addend: i64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Need {
    version: u16,
    count: u16,
    file: u32,
    aux: u32,
    next: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct NeedAux {
    hash: u32,
    flags: u16,
    other: u16,
    name: u32,
    next: u32,
}

/// The loader's counts of libraries loaded and unloaded, at the last look that saw all there were.
static SEEN: [AtomicU64; 2] = [const { AtomicU64::new(u64::MAX) }; 2];
/// Some library may have been loaded past [`open`].
static WATCH: AtomicBool = AtomicBool::new(false);
/// Guards what is below and the slots of other libraries; only ever tried.
static LOCK: AtomicU32 = AtomicU32::new(0);
/// Where the libraries lie that have been looked through.
static DONE: AtomicPtr<Vec<(usize, usize)>> = AtomicPtr::new(std::ptr::null_mut());
/// Our hooks by name.
static OURS: AtomicPtr<Vec<(&'static CStr, usize)>> = AtomicPtr::new(std::ptr::null_mut());

/// Before main: what is loaded with the program is bound in the program's scope, and need not be looked through.
pub fn start() {
    let Some(_g) = lock::try_lock(&LOCK) else { return };
    let mut done = Box::<Vec<(usize, usize)>>::default();
    // SAFETY: the callback matches, and the list outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(with_program), (&raw mut *done).cast()) };
    let now = counts();
    DONE.store(Box::into_raw(done), Relaxed);
    SEEN[0].store(now[0], Relaxed);
    SEEN[1].store(now[1], Relaxed);
}

unsafe extern "C" fn with_program(info: *mut dl_phdr_info, _: size_t, out: *mut c_void) -> c_int {
    // SAFETY: the loader's, which keeps the library loaded for as long as this runs.
    if let Some(o) = unsafe { Object::new(&*info) } {
        // SAFETY: `start`'s list, which waits for us.
        unsafe { &mut *out.cast::<Vec<(usize, usize)>>() }.push((o.dynamic, o.span.end));
    }
    0
}

/// Where a call of dlopen goes on: to [`open`], or to libc's own with the caller's return address.
extern "C" fn way(path: *const c_char, flags: c_int) -> usize {
    if flags & libc::RTLD_DEEPBIND != 0 && !path.is_null() {
        // SAFETY: not null: the program's NUL-terminated path.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        if path.contains(&b'/') && !path.contains(&b'$') {
            return open as *const () as usize;
        }
        WATCH.store(true, Relaxed);
    }
    entry!(dlopen).get()
}

/// Loads a library by its path, which is the same whoever asks, and looks it through.
unsafe extern "C" fn open(path: *const c_char, flags: c_int) -> *mut c_void {
    // SAFETY: the program's own arguments.
    let handle = real!(dlopen(path => *const c_char, flags => c_int) -> *mut c_void);
    if !handle.is_null() && !look_now() {
        WATCH.store(true, Relaxed);
    }
    handle
}

#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void {
    // The loader knows its caller by the return address, which a jump leaves in place.
    core::arch::naked_asm!(
        ".cfi_startproc",
        "push rdi",
        ".cfi_adjust_cfa_offset 8",
        "push rsi",
        ".cfi_adjust_cfa_offset 8",
        "sub rsp, 8",
        ".cfi_adjust_cfa_offset 8",
        "call {way}",
        "add rsp, 8",
        ".cfi_adjust_cfa_offset -8",
        "pop rsi",
        ".cfi_adjust_cfa_offset -8",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        "jmp rax",
        ".cfi_endproc",
        way = sym way,
    )
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "stp x29, x30, [sp, #-32]!",
        ".cfi_adjust_cfa_offset 32",
        ".cfi_rel_offset x29, 0",
        ".cfi_rel_offset x30, 8",
        "stp x0, x1, [sp, #16]",
        "bl {way}",
        "mov x16, x0",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        ".cfi_adjust_cfa_offset -32",
        ".cfi_restore x29",
        ".cfi_restore x30",
        "br x16",
        ".cfi_endproc",
        way = sym way,
    )
}

/// A connection begins or switches: a look, if one is due.
#[inline]
pub fn look() {
    // Relaxed: the libraries are guarded by the loader's lock; a thread that has had its library from dlopen
    // has seen the store, which came before.
    if WATCH.load(Relaxed) {
        look_now();
    }
}

/// Looks at the libraries that are new since the last look; whether it saw them all.
#[cold]
fn look_now() -> bool {
    let now = counts();
    // Relaxed: the counts only say that a look is due; what it looks at is guarded by the loader's lock.
    (SEEN[0].load(Relaxed) == now[0] && SEEN[1].load(Relaxed) == now[1]) || look_through(now)
}

/// How many libraries have been loaded, and how many unloaded.
pub fn counts() -> [u64; 2] {
    /// The first library tells of all.
    unsafe extern "C" fn first(info: *mut dl_phdr_info, _: size_t, out: *mut c_void) -> c_int {
        // SAFETY: the loader's, and the words below.
        unsafe { out.cast::<[u64; 2]>().write([(*info).dlpi_adds, (*info).dlpi_subs]) };
        1
    }
    let mut now = [0u64; 2];
    // SAFETY: the callback matches, and gets two words that outlive the call.
    unsafe { libc::dl_iterate_phdr(Some(first), (&raw mut now).cast()) };
    now
}

struct Search<'a> {
    done: &'a mut Vec<(usize, usize)>,
    ours: &'a [(&'static CStr, usize)],
    libc: Vec<Range<usize>>,
    /// The libraries that are looked up before us.
    before: Vec<Object<'a>>,
    met_us: bool,
    /// Some library is not relocated yet.
    early: bool,
    /// Some slot could not be written.
    failed: bool,
}

#[cold]
fn look_through(now: [u64; 2]) -> bool {
    // In a sandbox nothing is upgraded, so there is nothing to miss.
    if crate::hooks::direct::sandboxed() {
        return true;
    }
    let _section = engine::section::enter();
    // Never waits: another thread is at it.
    let Some(_g) = lock::try_lock(&LOCK) else { return false };
    let errno = crate::hook::errno();
    let Some(ours) = ours() else { return true };
    let mut done = DONE.load(Relaxed);
    if done.is_null() {
        done = Box::into_raw(Box::default());
        DONE.store(done, Relaxed);
    }
    // SAFETY: made above, never freed, and touched only under LOCK.
    let done = unsafe { &mut *done };
    if SEEN[1].load(Relaxed) != now[1] {
        // What was unloaded may have made room for another at its place.
        done.clear();
    }
    let mut s = Search {
        done,
        ours,
        libc: Vec::new(),
        before: Vec::new(),
        met_us: false,
        early: false,
        failed: false,
    };
    let p: *mut Search<'_> = &raw mut s;
    // SAFETY: the callback matches, and `s` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(neighbours), p.cast()) };
    // SAFETY: as above.
    unsafe { libc::dl_iterate_phdr(Some(one), p.cast()) };
    if !s.early {
        SEEN[0].store(now[0], Relaxed);
        SEEN[1].store(now[1], Relaxed);
    }
    if s.failed {
        // Bytes that go past us would be lost to the ring.
        crate::hooks::direct::go_quiet(Reason::Internal);
    }
    crate::hook::set_errno(errno);
    !s.early
}

fn is_libc(name: &[u8]) -> bool {
    let name = name.rsplit(|b| *b == b'/').next().unwrap_or(name);
    // libpthread was one of its own until glibc 2.34.
    name.starts_with(b"libc.so.") || name.starts_with(b"libpthread.so.")
}

unsafe extern "C" fn neighbours(info: *mut dl_phdr_info, _: size_t, s: *mut c_void) -> c_int {
    // SAFETY: `look_through`'s, which waits for us.
    let s = unsafe { &mut *s.cast::<Search<'_>>() };
    // SAFETY: the loader's; what is before us and libc are never unloaded.
    if let Some(o) = unsafe { Object::new(&*info) } {
        s.met_us |= o.is_us();
        if is_libc(o.name) {
            s.libc.push(o.span);
        } else if !s.met_us {
            s.before.push(o);
        }
    }
    0
}

unsafe extern "C" fn one(info: *mut dl_phdr_info, _: size_t, s: *mut c_void) -> c_int {
    // SAFETY: the loader's, which keeps the library loaded for as long as this runs.
    let object = unsafe { Object::new(&*info) };
    // SAFETY: `look_through`'s, which waits for us.
    let s = unsafe { &mut *s.cast::<Search<'_>>() };
    let Some(o) = object else { return 0 };
    let id = (o.dynamic, o.span.end);
    // libc's own calls are its own business, and ours are meant to reach it.
    if is_libc(o.name) || o.is_us() || s.done.contains(&id) {
        return 0;
    }
    match o.past_us(s) {
        Some(slots) => {
            for (at, hook) in slots {
                s.failed |= !o.lead(at, hook);
            }
            s.done.push(id);
        }
        None => s.early = true,
    }
    0
}

/// A loaded library.
struct Object<'a> {
    name: &'a [u8],
    base: usize,
    span: Range<usize>,
    /// What the loader write-protects after relocation.
    relro: Range<usize>,
    dynamic: usize,
}

impl<'a> Object<'a> {
    /// # Safety
    /// `info` is the loader's, for as long as the object lives.
    unsafe fn new(info: &'a dl_phdr_info) -> Option<Self> {
        let name = if info.dlpi_name.is_null() {
            &[]
        } else {
            // SAFETY: not null: the loader's NUL-terminated name.
            unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes()
        };
        let base = info.dlpi_addr as usize;
        // SAFETY: the library's program headers, as many as it says.
        let list = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
        let (mut low, mut high, mut dynamic, mut relro) = (usize::MAX, 0, 0, 0..0);
        for p in list {
            let at = base.wrapping_add(p.p_vaddr as usize);
            let end = at.wrapping_add(p.p_memsz as usize);
            match p.p_type {
                libc::PT_LOAD => {
                    low = low.min(at);
                    high = high.max(end);
                }
                libc::PT_DYNAMIC => dynamic = at,
                libc::PT_GNU_RELRO => relro = at..end,
                _ => {}
            }
        }
        (dynamic != 0 && low < high).then_some(Object { name, base, span: low..high, relro, dynamic })
    }

    /// An entry of the dynamic section.
    fn value(&self, tag: i64) -> Option<usize> {
        let mut at = self.dynamic as *const [usize; 2];
        loop {
            // SAFETY: the section ends with DT_NULL, and is mapped while the library is loaded.
            let [t, v] = unsafe { *at };
            if t == 0 {
                return None;
            }
            if t as i64 == tag {
                return Some(v);
            }
            at = at.wrapping_add(1);
        }
    }

    /// An address in the dynamic section. The loader adds the base, but not for the vDSO.
    fn address(&self, tag: i64) -> Option<usize> {
        let v = self.value(tag)?;
        let a = if self.span.contains(&v) { v } else { self.base.wrapping_add(v) };
        self.span.contains(&a).then_some(a)
    }

    fn symbol(&self, i: usize) -> Option<libc::Elf64_Sym> {
        let table = self.address(tag::SYMBOLS)? as *const libc::Elf64_Sym;
        // SAFETY: `i` comes from the library's own tables; what it says of itself the loader believes as well.
        Some(unsafe { *table.wrapping_add(i) })
    }

    fn text(&self, at: u32) -> Option<&'a CStr> {
        let p = self.address(tag::STRINGS)?.wrapping_add(at as usize) as *const c_char;
        // SAFETY: an offset from the library's own tables into its NUL-terminated strings.
        Some(unsafe { CStr::from_ptr(p) })
    }

    /// Whether the library wants its symbol `i` from libc.
    fn wants_libc(&self, i: usize) -> bool {
        let (Some(versions), Some(mut at)) = (self.address(tag::VERSIONS), self.address(tag::NEEDED)) else {
            return false;
        };
        // SAFETY: one for each symbol.
        let version = unsafe { *(versions as *const u16).wrapping_add(i) } & 0x7fff;
        loop {
            // SAFETY: a record of the list that the dynamic section names.
            let need = unsafe { *(at as *const Need) };
            let mut aux = at.wrapping_add(need.aux as usize);
            for _ in 0..need.count {
                // SAFETY: as above, as many as the record says.
                let a = unsafe { *(aux as *const NeedAux) };
                if a.other & 0x7fff == version {
                    return self.text(need.file).is_some_and(|f| is_libc(f.to_bytes()));
                }
                aux = aux.wrapping_add(a.next as usize);
            }
            if need.next == 0 {
                return false;
            }
            at = at.wrapping_add(need.next as usize);
        }
    }

    /// The slots that lead past us, to where; `None` if the library is not relocated yet.
    fn past_us(&self, s: &Search<'_>) -> Option<Vec<(usize, usize)>> {
        let mut out = Vec::new();
        for (table, size) in [(tag::RELA, tag::RELA_SIZE), (tag::PLT, tag::PLT_SIZE)] {
            let (Some(at), Some(size)) = (self.address(table), self.value(size)) else { continue };
            for k in 0..size / size_of::<Rela>() {
                // SAFETY: the k-th of a table of that size.
                let r = unsafe { *(at as *const Rela).wrapping_add(k) };
                if BOUND.contains(&(r.info as u32))
                    && let Some(name) =
                        self.symbol((r.info >> 32) as usize).and_then(|s| self.text(s.st_name))
                    && let Ok(found) = s.ours.binary_search_by(|o| o.0.cmp(name))
                {
                    out.extend(self.slot(r, &s.ours[found], s)?);
                }
            }
        }
        Some(out)
    }

    /// The state of one slot, by the module's table.
    fn slot(
        &self,
        r: Rela,
        (name, hook): &(&'static CStr, usize),
        s: &Search<'_>,
    ) -> Option<Option<(usize, usize)>> {
        let at = self.base.wrapping_add(r.offset);
        if !self.span.contains(&at) || !at.is_multiple_of(align_of::<usize>()) {
            return Some(None);
        }
        // SAFETY: an aligned word of the library's data, written by the loader and by us only.
        // Relaxed: an address of code, which needs no publication.
        let now = unsafe { &*(at as *const AtomicUsize) }.load(Relaxed);
        if now < self.span.len() {
            return None;
        }
        let i = (r.info >> 32) as usize;
        let lazy = || {
            self.span.contains(&now)
                && self.symbol(i).is_some_and(|s| s.st_shndx == 0)
                && self.wants_libc(i)
                && !s.before.iter().any(|o| o.defines(name))
        };
        let past = s.libc.iter().any(|r| r.contains(&now)) || lazy();
        Some(past.then_some((at, *hook)))
    }

    /// Stores `hook` in the slot at `at`, which may be write-protected; whether that could be done.
    fn lead(&self, at: usize, hook: usize) -> bool {
        // SAFETY: no pointers.
        let page = unsafe { libc::getauxval(libc::AT_PAGESZ) } as usize;
        let start = at & !(page - 1);
        if (self.relro.start & !(page - 1)..self.relro.end & !(page - 1)).contains(&at) {
            // Not protected again: another thread may be in dlopen, and the loader still writing there.
            // SAFETY: a page of the library's data; who reads it goes on reading.
            if unsafe { libc::mprotect(start as *mut c_void, page, libc::PROT_READ | libc::PROT_WRITE) } < 0 {
                return false;
            }
        }
        // By the kernel, which fails where a store would fault, should the loader protect the page now. It
        // copies an aligned word as one.
        let from = iovec { iov_base: (&raw const hook).cast_mut().cast(), iov_len: size_of::<usize>() };
        let to = iovec { iov_base: at as *mut c_void, iov_len: size_of::<usize>() };
        // SAFETY: reads our word, writes the slot, an aligned word of the library's data that the loader fills.
        let n = unsafe {
            libc::process_vm_writev(engine::sys::getpid(), &raw const from, 1, &raw const to, 1, 0)
        };
        n > 0
    }
}

/// Our hooks, by name: what this library exports. Under LOCK.
fn ours() -> Option<&'static [(&'static CStr, usize)]> {
    let mut p = OURS.load(Relaxed);
    if p.is_null() {
        let mut list: Vec<(&'static CStr, usize)> = Vec::new();
        // SAFETY: the callback matches, and the list outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(exports), (&raw mut list).cast()) };
        list.sort_unstable();
        p = Box::into_raw(Box::new(list));
        OURS.store(p, Relaxed);
    }
    // SAFETY: made above, never changed or freed.
    let list = unsafe { &*p };
    (!list.is_empty()).then_some(list)
}

unsafe extern "C" fn exports(info: *mut dl_phdr_info, _: size_t, out: *mut c_void) -> c_int {
    // SAFETY: the loader's; this library is never unloaded, it is preloaded.
    let Some(o) = (unsafe { Object::new(&*info) }).filter(Object::is_us) else { return 0 };
    // SAFETY: `ours`' list, which waits for us.
    let out = unsafe { &mut *out.cast::<Vec<(&'static CStr, usize)>>() };
    for i in 0..o.symbols() {
        if let Some(sym) = o.symbol(i)
            && sym.st_shndx != 0
            && sym.st_info & 15 == FUNCTION
            && let Some(name) = o.text(sym.st_name)
        {
            out.push((name, o.base.wrapping_add(sym.st_value as usize)));
        }
    }
    1
}

impl Object<'_> {
    fn is_us(&self) -> bool {
        self.span.contains(&(look as fn() as usize))
    }

    fn defines(&self, name: &CStr) -> bool {
        (0..self.symbols())
            .filter_map(|i| self.symbol(i))
            .any(|s| s.st_shndx != 0 && self.text(s.st_name) == Some(name))
    }

    /// How many symbols there are: the end of the last chain of the GNU hash table.
    fn symbols(&self) -> usize {
        let Some(at) = self.address(tag::GNU_HASH) else { return 0 };
        let word = |i: usize| {
            // SAFETY: within the table, by its own counts.
            unsafe { *(at as *const u32).wrapping_add(i) }
        };
        let (buckets, first, bloom) = (word(0) as usize, word(1) as usize, word(2) as usize);
        let chains = 4 + 2 * bloom + buckets;
        let last = (4 + 2 * bloom..chains).map(|i| word(i) as usize).max().unwrap_or(0);
        if last < first {
            return first;
        }
        let mut i = last;
        while word(chains + i - first) & 1 == 0 {
            i += 1;
        }
        i + 1
    }
}
