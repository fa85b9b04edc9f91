//! How many times better than TCP, as a picture: a bar for each measure, a stroke where the goal is.

use super::{Goal, Row};
use crate::bars::{self, Bar};
use crate::rounds::Mode;

pub fn svg(rows: &[Row]) -> String {
    let bar = |r: &Row| {
        Some(Bar {
            name: format!("{} {}", r.case, r.measure.name),
            times: r.times(Mode::Libsmc, Mode::Tcp)?,
            colour: if r.reached() == Some(false) { "#d88" } else { "#58a" },
            goal: r.goals.iter().find_map(|g| match g {
                Goal::Times(n) => Some(*n),
                _ => None,
            }),
        })
    };
    let bars: Vec<Bar> = rows.iter().filter_map(bar).collect();
    bars::svg(
        "libsmc: times better than TCP",
        "bar: median; thin line: least to most; red stroke: goal",
        &bars,
    )
}
