//! What the golden machine has learned of its own clock: every quartz drifts in its own way. Whether the hardware clock
//! shows UTC or local time stays.

use super::{Change, Context, Piece};
use anyhow::Result;

const ADJTIME: &str = "/etc/adjtime";
/// The drift of the golden machine's clock, as the time daemons keep it.
const DRIFTS: &[&str] = &[
    "/var/lib/chrony/drift",
    "/var/lib/chrony/chrony.drift",
    "/var/lib/ntp/drift",
    "/var/lib/ntp/ntp.drift",
    "/var/lib/ntp/drift/ntp.drift",
    "/var/lib/ntpsec/ntp.drift",
];

/// The piece.
pub struct Clock;

impl Piece for Clock {
    fn name(&self) -> &'static str {
        "clock"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let mut changes = Vec::new();
        if let Some(old) = root.read_text(ADJTIME)? {
            // Drift and last adjustment, last calibration, and UTC or LOCAL.
            let zone = if old.lines().nth(2).is_some_and(|l| l.trim() == "LOCAL") { "LOCAL" } else { "UTC" };
            let fresh = old.split_ascii_whitespace().take(4).all(|w| w.parse::<f64>() == Ok(0.0));
            if !fresh && root.write_text(ADJTIME, &format!("0.0 0 0.0\n0\n{zone}\n"), 0o644)? {
                changes.push(Change::new(
                    "clock",
                    ADJTIME,
                    format!("no drift yet; the hardware clock shows {zone}"),
                ));
            }
        }
        for path in DRIFTS {
            if root.remove(path)? {
                changes.push(Change::new("clock", *path, "deleted"));
            }
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn the_drift_goes_and_local_time_stays() {
        let lab = Lab::new();
        lab.file(ADJTIME, "-0.135711 1700000000 0.000000\n1700000000\nLOCAL\n")
            .file("/var/lib/chrony/drift", "1 2\n");
        assert_eq!(Clock.apply(&lab.context()).unwrap().len(), 2);
        assert_eq!(lab.read(ADJTIME), "0.0 0 0.0\n0\nLOCAL\n");
        assert!(!lab.exists("/var/lib/chrony/drift"));
        assert!(Clock.apply(&lab.context()).unwrap().is_empty());
        lab.file(ADJTIME, "0.0 0 0\n0\nUTC\n");
        assert!(Clock.apply(&lab.context()).unwrap().is_empty());
    }
}
