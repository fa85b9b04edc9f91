//! Sections of documents that are measured, not typed in.

/// The text with another section between the marks.
pub fn replaced(text: &str, begin: &str, end: &str, section: &str) -> Option<String> {
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{section}\n{end}{after}"))
}

/// The section between the marks.
pub fn found<'a>(text: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(begin)?;
    rest.split_once(end).map(|(section, _)| section)
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
        assert_eq!(found(&text, begin, end), Some("\nold\n"));
        assert_eq!(replaced("no marks", begin, end, "new"), None);
    }
}
