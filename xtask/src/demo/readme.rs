//! Puts measured numbers into README.md: nobody types them in.

use std::fs;

use crate::figures::machine;
use crate::rounds::Result;
use crate::section;
use crate::shell;

const BEGIN: &str = "<!-- measured: begin (written by `cargo xtask demo --readme`) -->";
const END: &str = "<!-- measured: end -->";

/// Replaces what stands between the marks.
pub fn update(table: &str) -> Result<()> {
    let path = shell::root().join("README.md");
    let text = fs::read_to_string(&path)?;
    let section = format!("```text\n{}\n\n{}\n```", machine(), table.trim_end());
    fs::write(
        &path,
        section::replaced(&text, BEGIN, END, &section).ok_or("README.md has no measured section")?,
    )?;
    println!("README.md: the measured section is new");
    Ok(())
}
