//! The thread that relays: one loop around `poll`, which reads from the parent, opens and checks each chunk, keeps it, and
//! sends it on while it is hot in the cache. It never waits for a child, a disk or a lock that is held across I/O; what it
//! does is decided by [`crate::core::relay`].

use crate::buffer::{Buffer, Pools};
use crate::chunk::{Kind, Sealed};
use crate::core::relay::{Answer, Change, Relay};
use crate::core::waits::Waits;
use crate::core::wave::Status;
use crate::core::{Clock, Link, NodeId, Time};
use crate::link::{self, Dialled, LinkId};
use crate::node::{Command, Config, Report, Reporter, Shared, Standing, Welcomed};
use crate::seal::Seal;
use crate::sign::Checker;
use crate::sockets::{Arrived, Child, Parent, Sent, Workshop};
use crate::stream::{Tally, check_end};
use crate::{Error, core::HEAD};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// The longest sleep: deadlines are looked at this often.
const SLEEP: Duration = Duration::from_millis(250);
/// A sleep while an acknowledgement waits to be due.
const NAP: Duration = Duration::from_millis(50);
/// What was waited for is published so often.
const WAITS: Duration = Duration::from_millis(100);
/// Chunks that are read ahead of what a blocked child is being sent: more would only travel through cold memory.
const AHEAD: u64 = 4;
/// A child that has taken nothing for so long holds nobody back: its disk is busy, and this node's own may go on.
const HOLD: Duration = Duration::from_millis(20);
/// Chunks read from the parent before others get a look in.
const BURST: usize = 4;

/// What the end of a connection is called whose last bytes do not count.
const RESET: &str = "the parent has given the connection up";

/// The relaying thread's state.
pub(crate) struct Engine {
    config: Config,
    shared: Arc<Shared>,
    relay: Relay,
    workshop: Workshop,
    report: Reporter,
    clock: Clock,
    begun: Instant,
    now: Time,
    tally: Tally,
    checker: Option<Checker>,
    parent: Option<Parent>,
    children: Vec<Child>,
    trimmed: u64,
    /// How far the consumer was when it was last asked.
    seen: u64,
    /// What was last published.
    shown: Standing,
    waits: Waits,
}

impl Engine {
    pub(crate) fn new(
        config: Config,
        shared: Arc<Shared>,
        seal: Arc<Seal>,
        pools: Pools,
        report: Reporter,
    ) -> Self {
        let relay = Relay::new(config.me, config.limits, config.me != HEAD);
        let checker = config.signer.map(|key| Checker::new(key, &config.wave));
        Self {
            config,
            shared,
            relay,
            workshop: Workshop { seal, pools, hashes: checker.is_some() },
            report,
            clock: Clock::default(),
            begun: Instant::now(),
            now: Time::ZERO,
            tally: Tally::default(),
            checker,
            parent: None,
            children: Vec::new(),
            trimmed: 0,
            seen: 0,
            shown: Standing::default(),
            waits: Waits::default(),
        }
    }

    /// Relays until it is stopped.
    pub(crate) fn run(mut self) {
        while !self.shared.is_stopped() {
            self.now = self.clock.advance(self.begun.elapsed());
            while let Some(command) = self.shared.next_command() {
                self.obey(command);
            }
            self.take_incoming();
            self.consumer();
            self.send_to_children();
            self.trim();
            self.acknowledge();
            for child in self.relay.silent(self.now, self.config.dead_after) {
                if let Some(link) = self.relay.link_to(child) {
                    (self.report)(Report::Silent(child, link.id));
                }
            }
            self.publish();
            self.sleep();
        }
        // Dropping the sockets closes them: whoever is at the other end learns it at once. What the children have not taken yet
        // may still go to them: from now on no sealed buffer is used again.
        for child in self.children.drain(..) {
            child.leave();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Place(place, addresses) => {
                let changes = self.relay.place(place, self.now);
                for change in changes {
                    match change {
                        Change::CloseParent(_) => self.parent = None,
                        Change::Dial(node, link) => self.dial(node, &link, addresses.clone()),
                        Change::CloseChild(_, id) => self.children.retain(|child| child.link != id),
                    }
                }
                self.shared.expect(self.relay.links());
                if let Some(parent) = &mut self.parent {
                    parent.queue(&self.relay.acknowledge_again(self.now));
                }
            }
            Command::Dialled(id, result) => self.dialled(id, result),
            // Whoever asks may have gone away; it is then told nothing.
            Command::Hello(id, want, reply) => drop(reply.send(self.relay.look(&id, want))),
            Command::Child(welcomed) => self.welcome(*welcomed),
        }
    }

    fn dial(&mut self, node: NodeId, link: &Link, addresses: Vec<SocketAddr>) {
        let (shared, link, want) = (Arc::clone(&self.shared), link.clone(), self.relay.end());
        let (id, prologue) = (link.id, link::prologue(&self.config.wave, &link.id, node, self.config.me));
        log::debug!("dialling {node} for chunk {want}");
        let started = std::thread::Builder::new().name("dial".into()).spawn(move || {
            let result = link::dial(&addresses, &link, &prologue, want);
            shared.command(Command::Dialled(id, result));
        });
        if let Err(e) = started {
            (self.report)(Report::Lost(id, format!("no thread for dialling: {e}")));
        }
    }

    fn dialled(&mut self, id: LinkId, result: Result<Dialled, Error>) {
        if self.relay.parent().is_none_or(|(_, link)| link.id != id) {
            // An order has replaced this link meanwhile.
            return;
        }
        match result {
            Ok(Dialled::Open(stream, session)) => {
                let mut parent = Parent::new(id, stream, session);
                parent.queue(&self.relay.acknowledge_again(self.now));
                self.parent = Some(parent);
                (self.report)(Report::Joined(id));
            }
            Ok(Dialled::Lacking(oldest)) => (self.report)(Report::Lacking(id, oldest)),
            Err(e) => (self.report)(Report::Lost(id, e.to_string())),
        }
    }

    /// A child has shown that it is there: an old connection of its link is over.
    fn welcome(&mut self, child: Welcomed) {
        let Welcomed { link, want, stream, session, said } = child;
        if let (Some(node), Answer::Welcome) = self.relay.hello(&link, want, self.now) {
            self.children.retain(|child| child.link != link);
            self.children.push(Child::new(node, link, stream, session));
            self.relay.acknowledged(&link, &said, self.now);
        }
        // Else an order has replaced the link meanwhile, and the child has one too.
    }

    /// At the head: what the source has made.
    fn take_incoming(&mut self) {
        if self.config.me != HEAD {
            return;
        }
        while self.relay.room() {
            let Some(chunk) = self.shared.store.take_incoming() else { return };
            if chunk.header.number != self.relay.end() {
                let why = format!("the source made chunk {} out of order", chunk.header.number);
                self.shared.store.stop(&why);
                return;
            }
            self.keep(chunk, None);
            self.send_to_children();
        }
    }

    fn consumer(&mut self) {
        if self.config.me == HEAD {
            return;
        }
        let (consumed, gone) = self.shared.store.consumed();
        self.seen = consumed;
        self.relay.consumed(consumed);
        if gone && self.relay.has_consumer() {
            self.relay.consumer_gone();
        }
    }

    fn keep(&mut self, chunk: Sealed, opened: Option<Buffer>) {
        let last = matches!(chunk.header.kind, Kind::End | Kind::GivenUp);
        // What it occupies, not what it has on the wire: the window is a promise about memory.
        let size = u32::try_from(chunk.bytes.capacity()).unwrap_or(u32::MAX);
        self.shared.store.append(Arc::new(chunk), opened);
        self.relay.pushed(size, last);
    }

    fn trim(&mut self) {
        let first = self.relay.first();
        if first > self.trimmed {
            self.trimmed = first;
            self.shared.store.trim(first);
        }
    }

    fn send_to_children(&mut self) {
        let mut lost = Vec::new();
        for child in &mut self.children {
            loop {
                if child.is_idle() {
                    let Some(number) = self.relay.next_for(child.node) else { break };
                    let Some(chunk) = self.shared.store.get(number) else { break };
                    child.begin(chunk);
                }
                match child.send() {
                    Ok(Sent::Chunk(number)) => self.relay.sent(child.node, number, self.now),
                    Ok(Sent::Blocked) => break,
                    Err(e) => {
                        lost.push((child.link, child.node, e));
                        break;
                    }
                }
            }
        }
        for (id, node, e) in lost {
            self.child_lost(&id, node, &e.to_string());
        }
    }

    fn child_lost(&mut self, id: &LinkId, node: NodeId, why: &str) {
        log::debug!("the connection to {node} below ended: {why}");
        self.children.retain(|child| child.link != *id);
        self.relay.child_closed(id);
    }

    fn parent_lost(&mut self, why: &str) {
        if let Some(parent) = self.parent.take() {
            log::debug!("the connection to the parent ended: {why}");
            (self.report)(Report::Lost(parent.link, why.to_owned()));
        }
    }

    fn acknowledge(&mut self) {
        if let Some(parent) = &mut self.parent {
            if let Some(said) = self.relay.acknowledge(self.now) {
                parent.queue(&said);
            }
            if let Err(e) = parent.flush() {
                self.parent_lost(&e.to_string());
            }
        }
    }

    fn publish(&mut self) {
        let consumed = self.shared.store.consumed().0;
        let standing = Standing {
            status: Status {
                held: self.relay.end(),
                consumed,
                stuck: self.relay.stuck(),
                epoch: self.relay.epoch(),
                cover: self.relay.cover(),
            },
            fill: self.relay.fill(),
            drained: self.relay.is_drained(),
        };
        if standing != self.shown {
            self.shown = standing;
            *self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
        }
        if self.now >= Duration::from_micros(self.waits.time) + WAITS {
            self.waits.at(self.now);
            self.shared.waits.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&self.waits);
        }
    }

    /// Waits for something to do, and does what came over the sockets.
    fn sleep(&mut self) {
        let store = Arc::clone(&self.shared.store);
        let room = self.relay.room();
        store.set_full(!room);
        store.nudge();
        let held_back = self.is_held_back();
        store.waker.sleeping();
        // Whatever came before the line above has woken nobody: look once more.
        let busy = self.shared.has_commands()
            || self.shared.is_stopped()
            || (self.config.me == HEAD && room && store.has_incoming())
            || (!room && self.config.me != HEAD && store.consumed().0 > self.seen);
        let limit = if busy {
            Duration::ZERO
        } else if self.parent.is_some() && self.relay.has_news() {
            NAP
        } else if held_back {
            HOLD
        } else {
            SLEEP
        };
        let reading = |on: bool| if on { PollFlags::IN } else { PollFlags::empty() };
        let writing = |on: bool| if on { PollFlags::OUT } else { PollFlags::empty() };
        let mut fds = vec![PollFd::new(&store.waker, PollFlags::IN)];
        // A parent that is neither read from nor written to is left out: its end would be an event that nobody takes.
        let reads = room && !self.relay.is_complete() && !held_back;
        let asked = self.parent.as_ref().filter(|parent| reads || parent.has_queued());
        if let Some(parent) = asked {
            fds.push(PollFd::new(&parent.stream, reading(reads) | writing(parent.has_queued())));
        }
        let asked = asked.is_some();
        for child in &self.children {
            fds.push(PollFd::new(&child.stream, PollFlags::IN | writing(child.is_blocked())));
        }
        let time = Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) };
        let since = self.clock.advance(self.begun.elapsed());
        let polled = poll(&mut fds, Some(&time));
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        store.waker.awake(ready.first().is_some_and(|r| r.contains(PollFlags::IN)));
        match polled {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return,
            Err(e) => {
                // Without poll there is no relaying; a short pause keeps this from spinning.
                log::error!("waiting for sockets: {e}");
                std::thread::sleep(NAP);
                return;
            }
        }
        self.now = self.clock.advance(self.begun.elapsed());
        let blocked = self.children.iter().filter(|child| child.is_blocked()).map(|child| child.node);
        self.waits.waited(
            self.now.saturating_sub(since),
            self.relay.stuck(),
            self.is_starved(reads),
            blocked,
        );
        let mut ready = ready.into_iter().skip(1);
        if asked {
            let flags = ready.next().unwrap_or(PollFlags::empty());
            if reads && flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                self.read_parent();
            }
        }
        let flags: Vec<PollFlags> = ready.collect();
        let talking: Vec<LinkId> = self
            .children
            .iter()
            .zip(flags)
            .filter(|(_, flags)| flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
            .map(|(child, _)| child.link)
            .collect();
        for id in talking {
            self.read_child(&id);
        }
    }

    /// Whether a child is to take some of what is here before more is read.
    fn is_held_back(&mut self) -> bool {
        let (end, now) = (self.relay.end(), self.now);
        let mut held_back = false;
        for child in &mut self.children {
            let behind = child.sending().is_some_and(|number| end >= number + AHEAD);
            held_back |= child.is_blocked() && behind && child.still_for(now) < HOLD;
        }
        held_back && self.config.me != HEAD
    }

    /// Whether there is room and nothing comes. At the head that is so when no child keeps it from giving more.
    fn is_starved(&self, reads: bool) -> bool {
        if self.config.me == HEAD {
            reads && !self.children.is_empty() && !self.children.iter().any(Child::is_blocked)
        } else {
            reads && self.parent.is_some()
        }
    }

    fn read_child(&mut self, id: &LinkId) {
        let Some(child) = self.children.iter_mut().find(|child| child.link == *id) else { return };
        let node = child.node;
        match child.read() {
            Ok(said) => {
                for said in said {
                    self.relay.acknowledged(id, &said, self.now);
                }
            }
            Err(e) => self.child_lost(id, node, &e.to_string()),
        }
    }

    fn read_parent(&mut self) {
        for _ in 0..BURST {
            if !self.relay.room() || self.relay.is_complete() || self.is_held_back() {
                return;
            }
            let Some(parent) = &mut self.parent else { return };
            match parent.read(&self.workshop) {
                Ok(None) => return,
                Ok(Some(arrived)) => {
                    if let Err(e) = self.take(arrived) {
                        let reset = self.parent.as_ref().is_some_and(Parent::is_reset);
                        return if reset { self.parent_lost(RESET) } else { self.refuse(&e) };
                    }
                    // While it is hot in the cache.
                    self.send_to_children();
                }
                Err(Error::Header(_)) if parent.is_reset() => return self.parent_lost(RESET),
                Err(e @ Error::Header(..)) => return self.refuse(&e),
                Err(e) => {
                    if matches!(e, Error::Truncated) {
                        self.shared.received.refused.fetch_add(1, Ordering::Relaxed);
                    }
                    return self.parent_lost(&e.to_string());
                }
            }
        }
    }

    /// A copy that is not what the server sent is not kept and not passed on; the link is given up and the server told, so
    /// that it is asked for once more.
    fn refuse(&mut self, e: &Error) {
        self.shared.received.refused.fetch_add(1, Ordering::Relaxed);
        log::error!("{e}");
        if matches!(e, Error::End(_)) {
            // It is signed and sealed: what came before it is not what was sent, and no other parent would help.
            self.shared.end(Err(e.to_string()));
            self.shared.store.stop(&e.to_string());
        }
        if let Some(parent) = self.parent.take() {
            (self.report)(Report::Damaged(parent.link, self.relay.end(), e.to_string()));
        }
    }

    /// Checks a chunk, and keeps it.
    fn take(&mut self, arrived: Arrived) -> Result<(), Error> {
        let Arrived { chunk, opened, hash } = arrived;
        let (header, next) = (chunk.header, self.relay.end());
        if header.number != next {
            return Err(Error::Malformed(format!("chunk {} where {next} was next", header.number)));
        }
        let opened = opened?;
        if let Some(checker) = &mut self.checker {
            checker.check(&header, &hash.ok_or(Error::Forged(next))?, &opened)?;
        } else if header.kind == Kind::List {
            log::debug!("a list of hashes that nobody asked for");
        }
        let mut outcome = None;
        match header.kind {
            Kind::Data | Kind::Part | Kind::List => self.tally.add(&chunk),
            Kind::End => outcome = Some(Ok(check_end(&opened, &self.tally)?)),
            Kind::GivenUp => {
                let reason = Error::GivenUp(String::from_utf8_lossy(&opened).into_owned());
                outcome = Some(Err(reason.to_string()));
            }
        }
        let received = &self.shared.received;
        received.wire.fetch_add(chunk.wire_len() as u64, Ordering::Relaxed);
        if header.kind == Kind::Data {
            received.plain.fetch_add(u64::from(header.plain), Ordering::Relaxed);
        }
        received.chunks.store(next + 1, Ordering::Relaxed);
        self.keep(chunk, Some(opened));
        if let Some(outcome) = outcome {
            self.shared.end(outcome);
        }
        Ok(())
    }
}
