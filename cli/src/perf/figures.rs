//! What is made of measured numbers, here and in `cargo xtask bench` (which takes this file in by its path): medians,
//! ratios of neighbours, three digits. Nothing but std.

use std::fs;

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { (values[(n - 1) / 2] + values[n / 2]) / 2.0 }
}

/// How many times better `values` are than those of the same rounds, `than`: the least, the median, the most. What else
/// the machine does in a round it does to both, so it is each round that is compared.
pub fn times(values: &[f64], than: &[f64], less_is_better: bool) -> Option<[f64; 3]> {
    let ratio = |(a, b): (&f64, &f64)| if less_is_better { b / a } else { a / b };
    let mut r: Vec<f64> = values.iter().zip(than).map(ratio).collect();
    r.sort_by(f64::total_cmp);
    Some([*r.first()?, median(r.clone()), *r.last()?])
}

/// The order of round `n`: every other one is turned round.
pub fn in_turn<T: Copy>(all: &[T], n: usize) -> Vec<T> {
    let mut all = all.to_vec();
    if n % 2 == 1 {
        all.reverse();
    }
    all
}

/// Three digits that count.
pub fn short(v: f64) -> String {
    match v.abs() {
        a if !a.is_finite() => "-".into(),
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
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
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn ratios_are_of_neighbours() {
        // The machine is ten times slower in the second round, for both.
        assert_eq!(times(&[20.0, 2.0, 30.0], &[10.0, 1.0, 10.0], false), Some([2.0, 2.0, 3.0]));
        assert_eq!(times(&[5.0], &[10.0], true), Some([2.0; 3]));
        assert_eq!(times(&[], &[], true), None);
    }

    #[test]
    fn every_other_round_is_turned_round() {
        assert_eq!(in_turn(&[1, 2], 0), [1, 2]);
        assert_eq!(in_turn(&[1, 2], 1), [2, 1]);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([1234.5, 12.345, 1.2345].map(short), ["1234", "12.3", "1.23"]);
        assert_eq!(short(f64::NAN), "-");
    }
}
