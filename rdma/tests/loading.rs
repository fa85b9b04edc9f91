//! The library as it is loaded by name: it says what it is.
#![allow(clippy::unwrap_used)]

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

#[test]
fn it_is_loaded_by_name_and_tells_its_version() {
    let folder = std::env::current_exe().unwrap();
    let file = folder.with_file_name("libsmc_rdma.so");
    let name = CString::new(file.as_os_str().as_bytes()).unwrap();
    // SAFETY: a library of ours, whose constructors do nothing; it is never unloaded.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!library.is_null(), "{}", file.display());
    // SAFETY: the handle is valid, the name ends with a zero.
    let abi = unsafe { libc::dlsym(library, c"smc_rdma_abi".as_ptr()) };
    assert!(!abi.is_null());
    // SAFETY: that is how the function is declared in lib.rs.
    let abi: extern "C" fn() -> u32 = unsafe { std::mem::transmute(abi) };
    assert_eq!(abi(), smc_rdma::ABI);
}
