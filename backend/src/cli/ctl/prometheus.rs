use std::fmt::Write;

use barkeep_protocol::page::wrap::{Count, Snapshot};

/// The page in Prometheus' text format.
pub(super) fn page(pid: u32, snapshot: &Snapshot) -> String {
    let mut text = String::new();
    let vms = [(String::new(), snapshot.vms)];
    metric(&mut text, pid, "vms", "gauge", "VMs that there are", &vms);
    let devices: Vec<_> =
        snapshot.devices.iter().map(|device| (label("device", device), 1)).collect();
    metric(&mut text, pid, "device", "gauge", "devices that there are", &devices);
    for count in Count::ALL {
        let name = format!("{}_total", count.name());
        // They are told by reason, so that their sum is the number of all.
        if count == Count::FailOpens {
            let reasons: Vec<_> = snapshot
                .reasons
                .iter()
                .map(|(reason, times)| (label("reason", reason), *times))
                .collect();
            metric(&mut text, pid, &name, "counter", count.text(), &reasons);
        } else {
            let value = [(String::new(), snapshot.count(count))];
            metric(&mut text, pid, &name, "counter", count.text(), &value);
        }
    }
    text
}

fn metric(
    text: &mut String,
    pid: u32,
    name: &str,
    kind: &str,
    help: &str,
    samples: &[(String, u64)],
) {
    let name = format!("barkeep_wrap_{name}");
    // A String takes everything.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(text, "{name}{{pid=\"{pid}\"{labels}}} {value}");
    }
}

fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!(",{name}=\"{value}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_is_a_metric_and_labels_are_escaped() {
        let snapshot = Snapshot {
            pid: 7,
            library: "1".into(),
            vms: 2,
            vms_ever: 3,
            counts: [10, 11, 12, 13, 14, 15, 16, 5],
            reasons: vec![("a \"bad\" \\ thing".into(), 2), ("other".into(), 3)],
            devices: vec!["vfio 0000:03:00.0".into()],
        };
        let text = page(70, &snapshot);
        for line in [
            "# TYPE barkeep_wrap_vms gauge",
            "barkeep_wrap_vms{pid=\"70\"} 2",
            "barkeep_wrap_device{pid=\"70\",device=\"vfio 0000:03:00.0\"} 1",
            "# TYPE barkeep_wrap_faults_located_total counter",
            "barkeep_wrap_faults_located_total{pid=\"70\"} 10",
            "barkeep_wrap_forwarded_total{pid=\"70\"} 16",
            "barkeep_wrap_fail_opens_total{pid=\"70\",reason=\"a \\\"bad\\\" \\\\ thing\"} 2",
            "barkeep_wrap_fail_opens_total{pid=\"70\",reason=\"other\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
        assert_eq!(text.matches("# HELP ").count(), 2 + Count::ALL.len());
        assert!(!text.contains("fail_opens_total{pid=\"70\"} "));
    }
}
