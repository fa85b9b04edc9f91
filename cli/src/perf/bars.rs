//! Ratios as a picture (SVG), here and in `cargo xtask bench` (which takes this file in by its path): a bar for each, on
//! an axis of powers of ten, from a third as good to three hundred times as good.

use std::fmt::Write as _;

use super::figures::short;

/// A line of the picture.
#[derive(Debug)]
pub struct Bar {
    pub name: String,
    /// The least, the median, the most.
    pub times: [f64; 3],
    pub colour: &'static str,
    /// Where a stroke shows what is asked for.
    pub goal: Option<f64>,
}

const LEFT: f64 = 300.0;
const WIDTH: f64 = 520.0;
const STEP: f64 = 22.0;
const TOP: f64 = 50.0;
const LEAST: f64 = 1.0 / 3.0;
const MOST: f64 = 300.0;

fn x(times: f64) -> f64 {
    LEFT + WIDTH * (times.clamp(LEAST, MOST) / LEAST).log10() / (MOST / LEAST).log10()
}

/// What XML keeps for itself.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The picture. Bars that are no numbers are left out.
pub fn svg(title: &str, beneath: &str, bars: &[Bar]) -> String {
    let bars: Vec<&Bar> = bars.iter().filter(|b| b.times.iter().all(|v| v.is_finite() && *v > 0.0)).collect();
    let bottom = TOP + STEP * bars.len() as f64;
    let (w, h) = (LEFT + WIDTH + 80.0, bottom + 30.0);
    let (title, beneath) = (escaped(title), escaped(beneath));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{w}\" height=\"{h}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">{title}</text>\n\
         <text x=\"10\" y=\"36\" fill=\"#666\">{beneath}</text>\n"
    );
    for t in [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0] {
        let (at, colour) = (x(t), if t == 1.0 { "#000" } else { "#ccc" });
        let _ = writeln!(
            out,
            "<path d=\"M{at:.1} {TOP}V{bottom:.1}\" stroke=\"{colour}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{t}</text>",
            bottom + 16.0
        );
    }
    for (i, bar) in bars.iter().enumerate() {
        out += &drawn(bar, TOP + STEP * i as f64);
    }
    out + "</svg>\n"
}

fn drawn(bar: &Bar, y: f64) -> String {
    let [least, median, most] = bar.times;
    let (from, to) = (x(1.0).min(x(median)), x(1.0).max(x(median)));
    let mut out = format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"{}\"/>\
         <path d=\"M{:.1} {:.1}H{:.1}\" stroke=\"#024\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
        LEFT - 8.0,
        y + 15.0,
        escaped(&bar.name),
        y + 4.0,
        (to - from).max(1.0),
        bar.colour,
        x(least),
        y + 11.0,
        x(most),
        x(most).max(to) + 6.0,
        y + 15.0,
        short(median)
    );
    if let Some(n) = bar.goal {
        let _ =
            writeln!(out, "<path d=\"M{:.1} {:.1}v18\" stroke=\"#c00\" stroke-width=\"2\"/>", x(n), y + 2.0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_grows_with_the_ratio_and_ends() {
        assert!(x(0.5) < x(1.0) && x(1.0) < x(40.0));
        assert_eq!(x(1e9), LEFT + WIDTH);
        assert_eq!(x(0.0), LEFT);
    }

    #[test]
    fn names_are_text_and_what_is_no_number_is_left_out() {
        let bar = |name: &str, n: f64| Bar { name: name.into(), times: [n; 3], colour: "#58a", goal: None };
        let text = svg("a & b", "", &[bar("<x>", 2.0), bar("y", f64::NAN)]);
        assert!(text.contains("a &amp; b") && text.contains("&lt;x&gt;") && !text.contains(">y<"));
    }
}
