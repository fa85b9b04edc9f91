//! Devices, their ports and GIDs.
//!
//! Of a GID verbs tell the address only; whether it is RoCE v1 or v2 and which Ethernet device it belongs to stands
//! in sysfs, `ports/P/gid_attrs`.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{ibv_async_event, ibv_context, ibv_event_type, ibv_pd};
use smc::wire::smcr::{Gid, Mac, Mtu};

use crate::{check, failed};

/// An open device.
#[derive(Debug)]
pub struct Device {
    context: NonNull<ibv_context>,
    name: String,
}

// SAFETY: libibverbs locks what it shares inside a context (ibv_open_device(3) hands it to any thread), and the pointer
// is only taken back in `drop`, which has the only reference.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A GID of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GidEntry {
    /// Its place in the port's table.
    pub index: u8,
    /// The address.
    pub gid: Gid,
    /// RoCE version 2 (UDP); otherwise version 1.
    pub v2: bool,
    /// The Ethernet device it belongs to.
    pub netdev: String,
    /// That device's address.
    pub mac: Mac,
}

/// What a device tells without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The port has gone down, or up.
    Port(u8, bool),
    /// The port's GIDs have changed.
    Gids(u8),
    /// This queue pair has failed.
    QueuePair(u32),
    /// The device is gone.
    Fatal,
    /// Nothing that a link minds.
    Other,
}

/// The names of the devices that are there.
pub fn names() -> io::Result<Vec<String>> {
    with_list(|list| list.iter().map(|d| name_of(*d)).collect())
}

fn name_of(device: *mut rdma_sys::ibv_device) -> String {
    // SAFETY: a device of a list that is not freed yet; the name lives as long and ends with a zero.
    let name = unsafe { CStr::from_ptr(rdma_sys::ibv_get_device_name(device)) };
    name.to_string_lossy().into_owned()
}

fn with_list<T>(f: impl FnOnce(&[*mut rdma_sys::ibv_device]) -> T) -> io::Result<T> {
    let mut n = 0;
    // SAFETY: the argument is a valid place for a number.
    let list = unsafe { rdma_sys::ibv_get_device_list(&mut n) };
    if list.is_null() {
        return Err(failed("ibv_get_device_list"));
    }
    // SAFETY: the list has `n` entries until it is freed below.
    let all = unsafe { std::slice::from_raw_parts(list, usize::try_from(n).unwrap_or(0)) };
    let out = f(all);
    // SAFETY: it came from ibv_get_device_list and is freed once; devices that were opened stay valid.
    unsafe { rdma_sys::ibv_free_device_list(list) };
    Ok(out)
}

impl Device {
    /// Opens a device by its name.
    pub fn open(name: &str) -> io::Result<Arc<Self>> {
        let context = with_list(|list| {
            let device = list.iter().find(|d| name_of(**d) == name)?;
            // SAFETY: a device of a list that is not freed yet.
            NonNull::new(unsafe { rdma_sys::ibv_open_device(*device) })
        })?;
        let context = context.ok_or_else(|| failed("ibv_open_device"))?;
        let device = Arc::new(Self { context, name: name.to_string() });
        // SAFETY: the context is open, and nobody else has it yet; libibverbs looks at its descriptors in each call.
        let c = unsafe { &mut *context.as_ptr() };
        (c.cmd_fd, c.async_fd) = (high(c.cmd_fd), high(c.async_fd));
        // SAFETY: the descriptor is open and ours; O_NONBLOCK harms nobody else.
        unsafe { set_nonblocking(c.async_fd) }?;
        Ok(device)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn as_ptr(&self) -> *mut ibv_context {
        self.context.as_ptr()
    }

    /// What one packet of the port can carry; none: the port is down.
    pub fn mtu(&self, port: u8) -> io::Result<Option<Mtu>> {
        // SAFETY: plain numbers, for which zeros are values.
        let mut attr: rdma_sys::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open and `attr` a valid place for the answer.
        let rc = unsafe { rdma_sys::___ibv_query_port(self.as_ptr(), port, &mut attr) };
        check("ibv_query_port", rc)?;
        let up = attr.state == rdma_sys::ibv_port_state::IBV_PORT_ACTIVE;
        Ok(u8::try_from(attr.active_mtu).ok().and_then(|m| Mtu::try_from(m).ok()).filter(|_| up))
    }

    /// The port's GIDs, those in use.
    pub fn gids(&self, port: u8) -> io::Result<Vec<GidEntry>> {
        let base = format!("/sys/class/infiniband/{}/ports/{port}/gid_attrs", self.name);
        let mut out = Vec::new();
        for index in 0..=u8::MAX {
            // An entry that is not in use has neither type nor device.
            let read = |what: &str| std::fs::read_to_string(format!("{base}/{what}/{index}"));
            let (Ok(kind), Ok(netdev)) = (read("types"), read("ndevs")) else { continue };
            let netdev = netdev.trim().to_string();
            // SAFETY: sixteen bytes, for which zeros are a value.
            let mut gid: rdma_sys::ibv_gid = unsafe { std::mem::zeroed() };
            // SAFETY: the context is open and `gid` a valid place for the answer.
            let rc = unsafe { rdma_sys::ibv_query_gid(self.as_ptr(), port, i32::from(index), &mut gid) };
            check("ibv_query_gid", rc)?;
            // SAFETY: every pattern of sixteen bytes is a value of `raw`.
            let gid = Gid(unsafe { gid.raw });
            out.push(GidEntry { index, gid, v2: kind.trim() == "RoCE v2", mac: mac_of(&netdev), netdev });
        }
        Ok(out)
    }

    /// The descriptors that libibverbs has opened for it.
    #[must_use]
    pub fn fds(&self) -> [i32; 2] {
        // SAFETY: the context is open; its descriptors do not change.
        unsafe { [(*self.as_ptr()).cmd_fd, (*self.as_ptr()).async_fd] }
    }

    /// Becomes readable with [`Self::event`].
    #[must_use]
    pub fn event_fd(&self) -> i32 {
        // SAFETY: the context is open; its descriptor does not change.
        unsafe { (*self.as_ptr()).async_fd }
    }

    /// What the device has told; none: nothing more.
    pub fn event(&self) -> io::Result<Option<Event>> {
        // SAFETY: a pointer or number, and an enum of which 0 (IBV_EVENT_CQ_ERR) is a value.
        let mut e: ibv_async_event = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, its descriptor non-blocking, `e` a valid place for the answer.
        if unsafe { rdma_sys::ibv_get_async_event(self.as_ptr(), &mut e) } != 0 {
            let e = failed("ibv_get_async_event");
            return if e.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(e) };
        }
        use ibv_event_type::*;
        let event = match e.event_type {
            // SAFETY: of a port's event the element is its number.
            IBV_EVENT_PORT_ERR => Event::Port(unsafe { e.element.port_num } as u8, false),
            // SAFETY: as above.
            IBV_EVENT_PORT_ACTIVE => Event::Port(unsafe { e.element.port_num } as u8, true),
            // SAFETY: as above.
            IBV_EVENT_GID_CHANGE => Event::Gids(unsafe { e.element.port_num } as u8),
            IBV_EVENT_QP_FATAL | IBV_EVENT_QP_REQ_ERR | IBV_EVENT_QP_ACCESS_ERR => {
                // SAFETY: of a queue pair's event the element is that queue pair, which can't be destroyed before the
                // event is acknowledged, below.
                Event::QueuePair(unsafe { (*e.element.qp).qp_num })
            }
            IBV_EVENT_DEVICE_FATAL => Event::Fatal,
            _ => Event::Other,
        };
        // SAFETY: it came from ibv_get_async_event and is acknowledged once.
        unsafe { rdma_sys::ibv_ack_async_event(&mut e) };
        Ok(Some(event))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: opened by `open`; whatever was made of it holds an Arc of this, so nothing of it is left.
        unsafe { rdma_sys::ibv_close_device(self.context.as_ptr()) };
    }
}

fn mac_of(netdev: &str) -> Mac {
    let text = std::fs::read_to_string(format!("/sys/class/net/{netdev}/address")).unwrap_or_default();
    let mut mac = Mac::default();
    mac.0
        .iter_mut()
        .zip(text.trim().split(':'))
        .for_each(|(to, b)| *to = u8::from_str_radix(b, 16).unwrap_or(0));
    mac
}

/// The same file under a high number: low ones are the program's. The old number if there is none.
pub(crate) fn high(fd: i32) -> i32 {
    let n = smc::sys::dup_high(fd);
    if n < 0 {
        return fd;
    }
    smc::sys::close(fd);
    n
}

/// # Safety
/// `fd` is open and ours.
pub(crate) unsafe fn set_nonblocking(fd: i32) -> io::Result<()> {
    // SAFETY: by the caller's word; F_GETFL touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(failed("fcntl"));
    }
    Ok(())
}

/// A protection domain: what may be used together.
#[derive(Debug)]
pub struct Domain {
    pd: NonNull<ibv_pd>,
    device: Arc<Device>,
}

// SAFETY: as for `Device`: libibverbs locks inside, and only `drop` takes the pointer back.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// A new one.
    pub fn new(device: &Arc<Device>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let pd = unsafe { rdma_sys::ibv_alloc_pd(device.as_ptr()) };
        let pd = NonNull::new(pd).ok_or_else(|| failed("ibv_alloc_pd"))?;
        Ok(Arc::new(Self { pd, device: device.clone() }))
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn as_ptr(&self) -> *mut ibv_pd {
        self.pd.as_ptr()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; regions and queue pairs hold an Arc of this, so none is left.
        unsafe { rdma_sys::ibv_dealloc_pd(self.pd.as_ptr()) };
    }
}
