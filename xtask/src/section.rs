//! Sections of documents that are measured, not typed in, and the machine they were measured on.

use std::fs;

/// The text with another section between the marks.
pub fn replaced(text: &str, begin: &str, end: &str, section: &str) -> Option<String> {
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{section}\n{end}{after}"))
}

/// Processor, how many, and kernel.
pub fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field =
        |l: &str| l.starts_with("model name").then(|| l.split_once(':').map(|(_, v)| v.trim().to_owned()));
    let model = cpuinfo.lines().find_map(field).flatten().unwrap_or_else(|| std::env::consts::ARCH.into());
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {cpus} CPUs, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_section_changes() {
        let (begin, end) = ("<!-- begin -->", "<!-- end -->");
        let text = format!("a\n{begin}\nold\n{end}\nb\n");
        assert_eq!(
            replaced(&text, begin, end, "new").as_deref(),
            Some(&*format!("a\n{begin}\nnew\n{end}\nb\n"))
        );
        assert_eq!(replaced("no marks", begin, end, "new"), None);
    }
}
