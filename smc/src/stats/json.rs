//! Writing JSON: objects of numbers, texts and objects are all that is needed here, and a library that lives
//! in every process should not bring more.

use std::fmt::Write;

/// A text between quotes.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => {
                // Writing to a String does not fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// An object whose members stay in the order in which they come.
#[derive(Debug)]
pub struct Object(String);

impl Object {
    pub fn new() -> Self {
        Self(String::from("{"))
    }

    fn member(&mut self, name: &str, value: &str) -> &mut Self {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        self.0.push_str(&escaped(name));
        self.0.push(':');
        self.0.push_str(value);
        self
    }

    pub fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.member(name, &value.to_string())
    }

    pub fn maybe_number(&mut self, name: &str, value: Option<u64>) -> &mut Self {
        self.member(name, &value.map_or("null".into(), |n| n.to_string()))
    }

    pub fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.member(name, &escaped(value))
    }

    pub fn maybe_text(&mut self, name: &str, value: Option<&str>) -> &mut Self {
        self.member(name, &value.map_or("null".into(), escaped))
    }

    pub fn flag(&mut self, name: &str, value: bool) -> &mut Self {
        self.member(name, if value { "true" } else { "false" })
    }

    pub fn object(&mut self, name: &str, value: Self) -> &mut Self {
        self.member(name, &value.finish())
    }

    pub fn finish(self) -> String {
        self.0 + "}"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_quotes_are_escaped() {
        assert_eq!(escaped("a\"b\\c\n\u{1b}é"), "\"a\\\"b\\\\c\\u000a\\u001bé\"");
    }

    #[test]
    fn members_are_separated() {
        let mut o = Object::new();
        o.number("a", 1).maybe_text("b", None).flag("c", true).object("d", Object::new());
        assert_eq!(o.finish(), r#"{"a":1,"b":null,"c":true,"d":{}}"#);
    }
}
