//! What the PXE service tells the deployment. The queue is bounded and nobody waits for it: when the deployment does not
//! listen, events are dropped and the number of those is told with the next that finds room.

use super::nodes::ScriptKind;
use super::query::Platform;
use crate::nodes::Mac;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

/// How many events wait for the deployment at most.
const QUEUE: usize = 4096;

/// Something that happened in the PXE service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootEvent {
    /// A machine asked by DHCP or PXE. Told once for each stage of a boot (a ROM's PXE, iPXE, the agent).
    Seen {
        /// Its network card.
        mac: Mac,
        /// What it is.
        client: Client,
    },
    /// A machine got an address from us (never in proxy mode).
    Address {
        /// Its network card.
        mac: Mac,
        /// The address.
        address: IpAddr,
    },
    /// A file went out by TFTP.
    Tftp {
        /// Who got it.
        address: IpAddr,
        /// The file's name.
        file: String,
    },
    /// A file was asked for by HTTP.
    Http {
        /// Who asks.
        address: IpAddr,
        /// The file's name.
        file: &'static str,
    },
    /// A machine got its own script, which installs it or makes it wait.
    Script {
        /// Its network card.
        mac: Mac,
        /// What it is called.
        name: Option<String>,
        /// Which script.
        kind: ScriptKind,
        /// Its firmware.
        platform: Platform,
    },
    /// A machine was told to boot from its disk.
    LocalBoot {
        /// Its network card.
        mac: Mac,
        /// What it is called.
        name: Option<String>,
        /// Its firmware.
        platform: Platform,
    },
    /// dnsmasq ended by itself: nobody boots from the net any more.
    DnsmasqExited {
        /// How it ended and the last that it wrote.
        cause: String,
    },
    /// The HTTP server ended by itself.
    HttpFailed {
        /// Why.
        cause: String,
    },
    /// So many events were dropped because nobody took them.
    Dropped(u64),
}

/// Which program asks by DHCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// A network card's PXE ROM or a UEFI firmware's PXE, with its architecture number (RFC 4578).
    Pxe(u16),
    /// UEFI's HTTP boot, with its architecture number.
    HttpBoot(u16),
    /// iPXE, in its last stage before the script.
    Ipxe,
    /// Something else: an operating system, ka-agent.
    Other,
}

/// Where events are put in.
#[derive(Clone)]
pub struct Events {
    sender: SyncSender<BootEvent>,
    dropped: Arc<AtomicU64>,
}

/// A new queue.
#[must_use]
pub fn queue() -> (Events, Receiver<BootEvent>) {
    let (sender, receiver) = sync_channel(QUEUE);
    (Events { sender, dropped: Arc::default() }, receiver)
}

impl Events {
    /// Puts `event` in, or counts it as dropped.
    pub fn send(&self, event: BootEvent) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 && self.sender.try_send(BootEvent::Dropped(dropped)).is_err() {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        match self.sender.try_send(event) {
            // A receiver that is gone has no use for the number either.
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: u8) -> BootEvent {
        BootEvent::Address {
            mac: Mac::new([2, 0, 0, 0, 0, n]).unwrap(),
            address: IpAddr::from([10, 0, 0, n]),
        }
    }

    #[test]
    fn events_pass_in_order() {
        let (events, receiver) = queue();
        events.send(event(1));
        events.send(event(2));
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [event(1), event(2)]);
    }

    #[test]
    fn a_full_queue_counts_what_it_drops() {
        let (events, receiver) = queue();
        for _ in 0..QUEUE + 5 {
            events.send(event(1));
        }
        assert_eq!(receiver.try_iter().count(), QUEUE);
        events.send(event(2));
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [BootEvent::Dropped(5), event(2)]);
    }
}
