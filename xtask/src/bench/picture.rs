//! How many times better than TCP, as a picture: a bar for each measure, a stroke where the goal is.

use std::fmt::Write as _;

use super::{Goal, Row, report};
use crate::rounds::Mode;

const LEFT: f64 = 300.0;
const WIDTH: f64 = 520.0;
const STEP: f64 = 22.0;
const TOP: f64 = 50.0;
/// The axis: from a third of TCP to three hundred times as good, in powers of ten.
const LEAST: f64 = 1.0 / 3.0;
const MOST: f64 = 300.0;

fn x(times: f64) -> f64 {
    LEFT + WIDTH * (times.clamp(LEAST, MOST) / LEAST).log10() / (MOST / LEAST).log10()
}

/// What XML keeps for itself.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

pub fn svg(rows: &[Row]) -> String {
    let bars: Vec<(&Row, [f64; 3])> = rows
        .iter()
        .filter_map(|r| Some((r, r.times(Mode::Libsmc, Mode::Tcp)?)))
        .filter(|(_, t)| t.iter().all(|v| v.is_finite() && *v > 0.0))
        .collect();
    let bottom = TOP + STEP * bars.len() as f64;
    let (w, h) = (LEFT + WIDTH + 80.0, bottom + 30.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{w}\" height=\"{h}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">libsmc: times better than TCP</text>\n\
         <text x=\"10\" y=\"36\" fill=\"#666\">bar: median; thin line: least to most; red stroke: goal</text>\n"
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
    for (i, (row, [least, median, most])) in bars.iter().enumerate() {
        let y = TOP + STEP * i as f64;
        let name = escaped(&format!("{} {}", row.case, row.measure.name));
        let (from, to) = (x(1.0).min(x(*median)), x(1.0).max(x(*median)));
        let colour = if row.reached() == Some(false) { "#d88" } else { "#58a" };
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>\
             <rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>\
             <path d=\"M{:.1} {:.1}H{:.1}\" stroke=\"#024\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LEFT - 8.0,
            y + 15.0,
            y + 4.0,
            (to - from).max(1.0),
            x(*least),
            y + 11.0,
            x(*most),
            x(*most).max(to) + 6.0,
            y + 15.0,
            report::short(*median)
        );
        if let Goal::Times(n) = row.goal {
            let _ = writeln!(
                out,
                "<path d=\"M{:.1} {:.1}v18\" stroke=\"#c00\" stroke-width=\"2\"/>",
                x(n),
                y + 2.0
            );
        }
    }
    out + "</svg>\n"
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
}
