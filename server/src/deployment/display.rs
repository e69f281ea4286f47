//! What the operator sees: a live table on a terminal, one line a second otherwise, JSON lines when asked for.

use super::state::{Deployment, Held, Node, Status};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use ka_cli::units::{show_size, show_time};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often a line comes when there is no terminal.
const LINE: Duration = Duration::from_secs(1);
/// Brakes named in the summary.
const BRAKES: usize = 5;
/// Nodes shown one by one; more are summed up.
const ROWS: usize = 40;

/// The display.
#[derive(Debug)]
pub struct Display {
    kind: Kind,
    begun: Instant,
    last: Instant,
    last_line: String,
    last_bytes: u64,
}

#[derive(Debug)]
enum Kind {
    Table { multi: MultiProgress, head: ProgressBar, rows: BTreeMap<String, ProgressBar> },
    Lines,
    Json,
}

impl Display {
    /// A display that fits standard error.
    #[must_use]
    pub fn new(json: bool) -> Self {
        let now = Instant::now();
        let kind = if json {
            Kind::Json
        } else if std::io::stderr().is_terminal() {
            let multi = MultiProgress::new();
            let head = multi.add(ProgressBar::new_spinner());
            Kind::Table { multi, head, rows: BTreeMap::new() }
        } else {
            Kind::Lines
        };
        Self { kind, begun: now, last: now, last_line: String::new(), last_bytes: 0 }
    }

    /// One event, in words.
    pub fn say(&self, text: &str) {
        match &self.kind {
            Kind::Table { multi, .. } => {
                // Printing can only fail when the terminal is gone.
                let _ = multi.println(format!("{:>7.1} {text}", self.begun.elapsed().as_secs_f64()));
            }
            Kind::Lines => eprintln!("{:>7.1} {text}", self.begun.elapsed().as_secs_f64()),
            Kind::Json => emit(&json!({"event": "message", "text": text})),
        }
    }

    /// Shows how far everybody is; call it often.
    pub fn update(&mut self, deployment: &Deployment, plain: u64, total: u64, reading: &str) {
        let since = self.last.elapsed();
        let pause = if matches!(self.kind, Kind::Table { .. }) { Duration::from_millis(250) } else { LINE };
        if since < pause {
            return;
        }
        let slowest = deployment.nodes.values().filter(|n| n.status == Status::Running);
        let slowest = slowest.map(|n| n.progress.consumed).min().unwrap_or_default();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let rate = (slowest.saturating_sub(self.last_bytes) as f64 / since.as_secs_f64()) as u64;
        self.last = Instant::now();
        self.last_bytes = slowest;
        match &mut self.kind {
            Kind::Json => emit(&progress_json(deployment, plain, total)),
            Kind::Lines => {
                let line = one_line(deployment, plain, total, rate);
                if line != self.last_line {
                    eprintln!("{:>7.1} {line}", self.begun.elapsed().as_secs_f64());
                    self.last_line = line;
                }
            }
            Kind::Table { multi, head, rows } => {
                head.set_message(format!("{}  {reading}", one_line(deployment, plain, total, rate)));
                head.set_style(plain_style());
                for node in deployment.nodes.values().take(ROWS) {
                    let row = rows.entry(node.name.clone()).or_insert_with(|| {
                        let row = multi.add(ProgressBar::new_spinner());
                        row.set_style(plain_style());
                        row
                    });
                    row.set_message(row_text(node, total));
                }
            }
        }
    }

    /// Takes the live table away, before the summary.
    pub fn clear(&mut self) {
        if let Kind::Table { multi, .. } = &self.kind {
            // It can only fail when the terminal is gone.
            let _ = multi.clear();
        }
    }

    /// The summary at the end.
    pub fn summary(&mut self, deployment: &Deployment, total: u64, now: Instant) {
        self.clear();
        if matches!(self.kind, Kind::Json) {
            let mut value = progress_json(deployment, total, total);
            value["event"] = json!("summary");
            let (done, failed) = deployment.counts();
            value["done"] = json!(done);
            value["failed"] = json!(failed);
            value["brakes"] = brakes_json(deployment);
            emit(&value);
            return;
        }
        let mut out = String::new();
        out.push_str(&format!(
            "\n{:<20} {:<18} {:<8} {:>9}  {}\n",
            "NODE", "ADDRESS", "RESULT", "TIME", "REMARK"
        ));
        for node in deployment.nodes.values() {
            let (result, remark) = match &node.status {
                Status::Done => ("done", String::new()),
                Status::Failed { step, error } => ("FAILED", format!("{step}: {error}")),
                _ => ("?", node.step.clone()),
            };
            let time = show_time(node.until.unwrap_or(now).saturating_duration_since(node.since));
            out.push_str(&format!(
                "{:<20} {:<18} {result:<8} {time:>9}  {remark}\n",
                node.name,
                node.address.to_canonical()
            ));
        }
        let (done, failed) = deployment.counts();
        out.push_str(&format!("{done} done, {failed} failed"));
        if let (Some(Ok(record)), Some(time)) = (deployment.last_sent(), deployment.stream_time(now)) {
            let seconds = time.as_secs_f64().max(0.001);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            let rate = (record.bytes as f64 / seconds) as u64;
            let sent = show_size(record.bytes);
            out.push_str(&format!("; {sent} to each in {}, {}/s", show_time(time), show_size(rate)));
        }
        if let Some(line) = brakes_line(deployment) {
            out.push_str(&line);
        }
        if let Some(levels) = &deployment.levels {
            out.push_str(&format!("\ncompression: {levels}"));
        }
        eprintln!("{out}");
    }
}

/// What held the chain up for how long, the longest first.
fn brakes(deployment: &Deployment) -> Vec<(&Held, Duration)> {
    let mut brakes: Vec<(&Held, Duration)> =
        deployment.held_up.iter().map(|(held, time)| (held, *time)).collect();
    brakes.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    brakes
}

/// The longest of [`brakes`], for people; nothing when none was seen for a second.
fn brakes_line(deployment: &Deployment) -> Option<String> {
    let long = brakes(deployment).into_iter().filter(|(_, time)| time.as_secs() > 0).take(BRAKES);
    let long: Vec<String> =
        long.map(|(held, time)| format!("{} {}", deployment.describe(held), show_time(time))).collect();
    (!long.is_empty()).then(|| format!("\nbrakes: {}", long.join(", ")))
}

fn brakes_json(deployment: &Deployment) -> serde_json::Value {
    let each = brakes(deployment).into_iter().map(|(held, time)| {
        let mut value = deployment.describe_json(held);
        value["seconds"] = json!(time.as_secs_f64());
        value
    });
    each.collect()
}

fn plain_style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn emit(value: &serde_json::Value) {
    let mut out = std::io::stdout().lock();
    // Whoever reads the JSON lines may have gone away; the deployment goes on.
    let _ = writeln!(out, "{value}");
}

fn percent(done: u64, total: u64) -> u64 {
    done.saturating_mul(100).checked_div(total).unwrap_or(0).min(100)
}

fn one_line(deployment: &Deployment, plain: u64, total: u64, rate: u64) -> String {
    let mut steps: BTreeMap<&str, usize> = BTreeMap::new();
    for node in deployment.nodes.values() {
        let step = match &node.status {
            Status::Done => "done",
            Status::Failed { .. } => "FAILED",
            _ => &node.step,
        };
        *steps.entry(step).or_default() += 1;
    }
    let steps: Vec<String> = steps.iter().map(|(step, n)| format!("{n} {step}")).collect();
    if deployment.started.is_none() {
        return format!(
            "waiting for nodes: {}",
            if steps.is_empty() { "none yet".to_owned() } else { steps.join(", ") }
        );
    }
    let sent = format!("sent {} ({}%)", show_size(plain), percent(plain, total));
    let brake = deployment
        .brake()
        .map_or_else(String::new, |held| format!(", brake: {}", deployment.describe(&held)));
    format!("{sent}, slowest node {}/s{brake}: {}", show_size(rate), steps.join(", "))
}

fn row_text(node: &Node, total: u64) -> String {
    let consumed = node.progress.consumed;
    let width = 20;
    let filled = usize::try_from(percent(consumed, total)).unwrap_or(0) * width / 100;
    let state = match &node.status {
        Status::Done => "done".to_owned(),
        Status::Failed { step, error } => {
            format!("FAILED in {step}: {}", error.lines().next().unwrap_or_default())
        }
        _ => node.step.clone(),
    };
    format!("  {:<20} [{:<width$}] {:>10}  {state}", node.name, "#".repeat(filled), show_size(consumed))
}

fn progress_json(deployment: &Deployment, plain: u64, total: u64) -> serde_json::Value {
    let nodes: Vec<_> = deployment
        .nodes
        .values()
        .map(|n| {
            let (status, error) = match &n.status {
                Status::Preparing => ("preparing", None),
                Status::Ready => ("ready", None),
                Status::Running => ("running", None),
                Status::Done => ("done", None),
                Status::Failed { error, .. } => ("failed", Some(error)),
            };
            json!({
                "name": n.name, "address": n.address.to_canonical(), "mac": n.registration.mac, "status": status,
                "step": n.step, "error": error, "received_bytes": n.progress.plain,
                "consumed_bytes": n.progress.consumed, "wire_bytes": n.progress.wire, "entries": n.progress.entries,
                "facts": n.facts.iter().map(|(k, v)| json!({"name": k, "value": v})).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "event": "progress", "version": 1, "sent_bytes": plain, "total_bytes": total, "nodes": nodes,
        "brake": deployment.brake().map(|held| deployment.describe_json(&held)),
        "compression": deployment.levels,
    })
}
