//! Entries of variadic functions, in assembly: stable Rust can't define one.
//!
//! Each stores all argument registers beside each other, integer ones first and behind them the vector ones (16
//! bytes each), and calls a plain function with their address and that of the stack arguments.

macro_rules! variadic {
    ($($(#[$m:meta])* $name:ident => $to:ident;)*) => {$(
        $(#[$m])*
        #[cfg(target_arch = "x86_64")]
        #[unsafe(naked)]
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name() -> c_int {
            // 184 bytes and the return address keep the stack aligned to 16: six registers, eight vector ones.
            core::arch::naked_asm!(
                ".cfi_startproc",
                "sub rsp, 184",
                ".cfi_adjust_cfa_offset 184",
                "mov [rsp], rdi",
                "mov [rsp + 8], rsi",
                "mov [rsp + 16], rdx",
                "mov [rsp + 24], rcx",
                "mov [rsp + 32], r8",
                "mov [rsp + 40], r9",
                "movaps [rsp + 48], xmm0",
                "movaps [rsp + 64], xmm1",
                "movaps [rsp + 80], xmm2",
                "movaps [rsp + 96], xmm3",
                "movaps [rsp + 112], xmm4",
                "movaps [rsp + 128], xmm5",
                "movaps [rsp + 144], xmm6",
                "movaps [rsp + 160], xmm7",
                "mov rdi, rsp",
                "lea rsi, [rsp + 192]",
                "call {to}",
                "add rsp, 184",
                ".cfi_adjust_cfa_offset -184",
                "ret",
                ".cfi_endproc",
                to = sym $to,
            )
        }

        $(#[$m])*
        #[cfg(target_arch = "aarch64")]
        #[unsafe(naked)]
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name() -> c_int {
            core::arch::naked_asm!(
                ".cfi_startproc",
                "stp x29, x30, [sp, #-208]!",
                ".cfi_adjust_cfa_offset 208",
                ".cfi_rel_offset x29, 0",
                ".cfi_rel_offset x30, 8",
                "stp x0, x1, [sp, #16]",
                "stp x2, x3, [sp, #32]",
                "stp x4, x5, [sp, #48]",
                "stp x6, x7, [sp, #64]",
                "stp q0, q1, [sp, #80]",
                "stp q2, q3, [sp, #112]",
                "stp q4, q5, [sp, #144]",
                "stp q6, q7, [sp, #176]",
                "add x0, sp, #16",
                "add x1, sp, #208",
                "bl {to}",
                "ldp x29, x30, [sp], #208",
                ".cfi_adjust_cfa_offset -208",
                "ret",
                ".cfi_endproc",
                to = sym $to,
            )
        }
    )*};
}
pub(super) use variadic;
