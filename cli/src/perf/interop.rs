//! Results as a plain iperf3 tells and understands them.

use serde_json::{Value, json};

use super::meter::{Cpu, Ways};
use super::spec::{Spec, iperf3_id};
use super::test::Found;
use super::wire::{Problem, Result};

/// Ours, for it. `is_client`: what we are.
pub fn told(spec: &Spec, found: &Found, is_client: bool) -> Value {
    let percent = |seconds: f64| seconds / found.seconds * 100.0;
    let sends = |i: usize| spec.client_sends(i) == is_client;
    let streams: Vec<Value> = (0..found.flows.len())
        .map(|i| {
            let c = found.flow(i);
            json!({
                "id": iperf3_id(i),
                "bytes": if sends(i) { c.tx } else { c.rx },
                "retransmits": if sends(i) { 0 } else { -1 },
                "jitter": 0,
                "errors": 0,
                "packets": 0,
                "start_time": 0,
                "end_time": found.seconds,
            })
        })
        .collect();
    json!({
        "cpu_util_total": percent(found.cpu.total),
        "cpu_util_user": percent(found.cpu.user),
        "cpu_util_system": percent(found.cpu.system),
        // It is not counted here: what is sent as 0 is not shown.
        "sender_has_retransmits": if sends(0) { 0 } else { -1 },
        "streams": streams,
    })
}

/// Its, for us; what it does not tell is empty.
///
/// # Errors
/// If a connection is not among its results.
pub fn understood(spec: &Spec, j: &Value, mine: &Found, is_client: bool) -> Result<Found> {
    let list = j["streams"].as_array().map_or(&[][..], Vec::as_slice);
    let mut seconds: f64 = 0.0;
    let mut flows = Vec::new();
    for i in 0..mine.flows.len() {
        let one = list.iter().find(|s| s["id"].as_u64() == Some(iperf3_id(i) as u64));
        let one = one.ok_or_else(|| Problem::new("a stream is missing in the other end's results"))?;
        let bytes = one["bytes"].as_u64().or_else(|| one["bytes"].as_f64().map(|b| b as u64)).unwrap_or(0);
        // It sent what we received.
        flows.push(if spec.client_sends(i) == is_client { [0, bytes, 0] } else { [bytes, 0, 0] });
        seconds = seconds.max(one["end_time"].as_f64().unwrap_or(0.0));
    }
    // Versions before 3.7 do not tell the time.
    let seconds = if seconds > 0.0 { seconds } else { mine.seconds };
    let part = |name: &str| j[name].as_f64().unwrap_or(0.0) / 100.0 * seconds;
    let cpu =
        Cpu { total: part("cpu_util_total"), user: part("cpu_util_user"), system: part("cpu_util_system") };
    Ok(Found { all: flows.clone(), flows, seconds, cpu, ways: Ways::default(), error: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_tells_the_other_understands() {
        let spec = super::super::spec::example();
        let found = |flows: Vec<[u64; 3]>| Found {
            all: flows.clone(),
            flows,
            seconds: 2.0,
            cpu: Cpu { total: 1.0, user: 0.25, system: 0.75 },
            ways: Ways::default(),
            error: None,
        };
        let (client, server) = (found(vec![[5, 0, 1], [7, 0, 1]]), found(vec![[0, 5, 1], [0, 6, 1]]));
        let told = told(&spec, &server, false);
        let got = understood(&spec, &told, &client, true).expect("all is there");
        assert_eq!((got.flow(0).rx, got.flow(1).rx, got.seconds), (5, 6, 2.0));
        assert_eq!(got.cpu, server.cpu);
        assert!(understood(&spec, &json!({"streams": []}), &client, true).is_err());
        assert!(understood(&spec, &json!(null), &client, true).is_err());
    }
}
