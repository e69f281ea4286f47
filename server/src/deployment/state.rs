//! The deployment's decisions as plain state: what nodes and the source say goes in, what is to be sent comes out. No
//! sockets, no clock of its own; the loop in `run` feeds it.

mod brake;
mod waves;

use super::addresses::{addresses_for, places_of};
use super::claims::{Claims, Newcomer};
use super::command::Settings;
use ka_chain::control::{Progress, Purpose, Registration, Start, ToNode, ToServer};
use ka_chain::core::level::{Level, Used};
use ka_chain::core::wave;
use ka_chain::core::{Clock, HEAD, NodeId, Place, Time, wave::Wave};
use ka_chain::keys::CredentialId;
use ka_chain::node::Report;
use ka_chain::seal;
use ka_chain::sign::Signer;
use ka_chain::stream::EndRecord;
use ka_sys::speed::Speed;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a node that is owed another wave may go without a word about getting ready: its disk may be hung while its
/// machine answers pings.
const NEXT_READY: Duration = Duration::from_secs(300);
/// How long a node may be silent after the release.
const AFTER_RELEASE: Duration = Duration::from_secs(60);
/// How long a node whose connection was lost in a wave is waited for, before the deployment ends without it.
const RETURN: Duration = Duration::from_secs(5);
/// The same when no node is left at all: then it is the server's own network that is in trouble.
const RETURN_OF_ALL: Duration = Duration::from_secs(60);

use brake::Braking;
pub use brake::Held;

/// Names a control connection; counted up, never used twice.
pub type ConnectionId = u64;

/// How a node stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It registered and prepares its disk.
    Preparing,
    /// It can take its place.
    Ready,
    /// The stream flows to it, or it finishes after the stream.
    Running,
    /// Everything is done on it.
    Done,
    /// Its installation failed; it is still a relay until it is released.
    Failed {
        /// The step that failed.
        step: String,
        /// The causes.
        error: String,
    },
}

/// What the deployment knows of one node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its control connection.
    pub connection: ConnectionId,
    /// Whether that is open.
    pub connected: bool,
    /// Its session, the same whenever it comes again.
    pub session: CredentialId,
    /// Its name.
    pub name: String,
    /// What it said of itself.
    pub registration: Registration,
    /// Where it connected from.
    pub address: IpAddr,
    /// How it stands.
    pub status: Status,
    /// The step that it is in.
    pub step: String,
    /// How far the stream is on it.
    pub progress: Progress,
    /// The end record that it holds.
    pub ended: Option<EndRecord>,
    /// It says that it is done; believed when it holds what was sent.
    pub claims_done: bool,
    /// The last wave that it was in; 0 before its first.
    pub wave: u32,
    /// Waves that it was in.
    pub tries: u32,
    /// Facts for the summary.
    pub facts: Vec<(String, String)>,
    /// When it was last heard.
    pub heard: Time,
    /// When its connection was lost in a wave: it may come again.
    pub lost: Option<Time>,
    /// When it last said more than that it lives.
    pub spoke: Time,
    /// When it registered.
    pub since: Instant,
    /// When it was done or failed.
    pub until: Option<Instant>,
}

impl Node {
    /// Whether it will say nothing more of interest.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self.status, Status::Done | Status::Failed { .. })
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send this over a connection.
    Send(ConnectionId, ToNode),
    /// Begin to feed the chain.
    Feed(seal::Wave, Option<Arc<Signer>>),
    /// The head's place in it.
    Head(Place),
    /// How hard the source's chunks are compressed from now on.
    Compress(Level),
    /// The stream is over at every node: the head may close.
    CloseHead,
    /// Close a connection after everything was sent over it.
    Close(ConnectionId),
    /// Close a connection at once: its node is dead and will not read anything.
    Cut(ConnectionId),
    /// Tell the operator.
    Say(String),
    /// A node's state became final, for the boot service.
    Final(String),
}

/// The wave whose stream flows.
#[derive(Debug)]
struct Current {
    core: Wave,
    key: seal::Wave,
    signer: Option<Arc<Signer>>,
    names: BTreeMap<NodeId, String>,
    ids: BTreeMap<String, NodeId>,
    /// Nodes that have their `Start`; later orders are `Place`s.
    placed: BTreeSet<NodeId>,
    braking: Braking,
}

/// The deployment.
#[derive(Debug)]
pub struct Deployment {
    settings: Settings,
    id: [u8; 16],
    /// The nodes by name.
    pub nodes: BTreeMap<String, Node>,
    connections: BTreeMap<ConnectionId, String>,
    claims: Claims,
    clock: Clock,
    /// The running time, as of the last event.
    now: Time,
    begun: Instant,
    /// Since when nodes that are ready have waited for a wave.
    waiting_since: Option<Time>,
    current: Option<Current>,
    /// Nodes that still wait for their release, and when the next one gets it.
    releasing: VecDeque<ConnectionId>,
    next_release: Time,
    /// How long each brake has held the chain up.
    pub held_up: BTreeMap<Held, Duration>,
    /// How fast the golden node's own interfaces are.
    pub speeds: Vec<Speed>,
    /// The levels that the stream was compressed at, when they are chosen by the brake.
    pub levels: Option<Used>,
    /// Waves that have begun.
    pub waves: u32,
    /// Chunks that nodes refused.
    pub damaged: u64,
    /// When the first stream began.
    pub started: Option<Instant>,
    /// When the last stream was over at every node.
    pub released: Option<Instant>,
    /// What each wave's source sent, once it is all sent; or why it failed.
    sent: BTreeMap<u32, Result<EndRecord, String>>,
}

impl Deployment {
    /// A deployment without nodes.
    #[must_use]
    pub fn new(settings: Settings, id: [u8; 16], now: Instant) -> Self {
        Self {
            settings,
            id,
            nodes: BTreeMap::new(),
            connections: BTreeMap::new(),
            claims: Claims::default(),
            clock: Clock::default(),
            now: Time::ZERO,
            begun: now,
            waiting_since: None,
            current: None,
            releasing: VecDeque::new(),
            next_release: Time::ZERO,
            held_up: BTreeMap::new(),
            speeds: Vec::new(),
            levels: None,
            waves: 0,
            damaged: 0,
            started: None,
            released: None,
            sent: BTreeMap::new(),
        }
    }

    fn time(&mut self, now: Instant) -> Time {
        self.now = self.clock.advance(now.saturating_duration_since(self.begun));
        self.now
    }

    /// What the last wave's source sent, once it is all sent; or why it failed.
    #[must_use]
    pub fn last_sent(&self) -> Option<&Result<EndRecord, String>> {
        self.sent.get(&self.waves)
    }

    /// Lets a node in, or refuses it, or asks the one that has its name.
    pub fn register(&mut self, newcomer: Newcomer, now: Instant) -> Vec<Action> {
        let time = self.time(now);
        let Newcomer { connection, address, session, .. } = newcomer;
        let mut actions = Vec::new();
        if let Some(old) = self.nodes.get(&newcomer.name).filter(|old| old.connected) {
            let (holder, name) = (old.connection, newcomer.name.clone());
            if old.session != session {
                return self.claim(newcomer, holder);
            }
            // It knows better than we do that its old connection is over.
            actions.push(Action::Close(holder));
            actions.extend(self.closed(holder, &format!("{name} came over another one"), now));
        }
        let Newcomer { name, registration, order, .. } = newcomer;
        if let Some(old) = self.nodes.get(&name) {
            // It was power-cycled, or failed and came again.
            let tries = old.tries;
            if tries >= self.settings.tries {
                let why = format!("{name} was in {tries} waves already (--tries)");
                actions.extend(refuse(connection, why.clone()));
                actions.push(Action::Say(format!("{address} was refused: {why}")));
                return actions;
            }
            actions.push(Action::Say(format!("{name} is here again, from {address}")));
            self.connections.remove(&old.connection);
        }
        let late = if self.waves > 0 { ", for the next wave" } else { "" };
        actions.push(Action::Say(format!("{name} registered from {address}{late}")));
        let tries = self.nodes.get(&name).map_or(0, |old| old.tries);
        let node = Node {
            connection,
            connected: true,
            session,
            name: name.clone(),
            registration,
            address,
            status: Status::Preparing,
            step: "register".to_owned(),
            progress: Progress::default(),
            ended: None,
            claims_done: false,
            wave: 0,
            tries,
            facts: Vec::new(),
            heard: time,
            lost: None,
            spoke: time,
            since: now,
            until: None,
        };
        self.connections.insert(connection, name.clone());
        self.nodes.insert(name.clone(), node);
        actions.push(Action::Send(connection, ToNode::Order { name, body: order }));
        actions
    }

    /// Somebody claims the name of a node that is here: that one is asked.
    fn claim(&mut self, newcomer: Newcomer, holder: ConnectionId) -> Vec<Action> {
        let (connection, name, address) = (newcomer.connection, newcomer.name.clone(), newcomer.address);
        let Some(number) = self.claims.make(newcomer) else {
            let mut actions = refuse(connection, format!("somebody claims to be {name} already"));
            actions.push(Action::Say(format!(
                "ALARM: a third node claims to be {name}, from {address}; it was refused"
            )));
            return actions;
        };
        vec![
            Action::Say(format!("a second node claims to be {name}, from {address}; the first is asked")),
            Action::Send(holder, ToNode::Ping(number)),
        ]
    }

    /// The node behind a connection.
    #[must_use]
    pub fn node_of(&self, connection: ConnectionId) -> Option<&Node> {
        self.connections.get(&connection).and_then(|name| self.nodes.get(name))
    }

    /// A message came.
    pub fn message(&mut self, connection: ConnectionId, message: ToServer, now: Instant) -> Vec<Action> {
        let time = self.time(now);
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        node.heard = time;
        if !matches!(message, ToServer::Pong(_)) {
            node.spoke = time;
        }
        let id = self.current.as_ref().and_then(|current| current.ids.get(&node.name)).copied();
        if let (Some(current), Some(id)) = (&mut self.current, id) {
            current.core.heard(id, time);
        }
        let mut actions = Vec::new();
        match message {
            ToServer::Register(_) => {
                actions.push(Action::Say(format!("{} registered twice; it is dropped", node.name)));
                actions.push(Action::Close(connection));
                actions.extend(self.closed(connection, "it registered twice", now));
            }
            ToServer::Step(step) => node.step = clean(&step, 64),
            // Logs go to the node's file; see `run`.
            ToServer::Log { .. } => {}
            ToServer::Pong(number) => {
                if let Some(claim) = self.claims.answered(&node.name, number) {
                    let (name, here, from) = (&node.name, node.address, claim.address);
                    let why = format!("a node named {name} is here already, from {here}, and answers");
                    actions.extend(refuse(claim.connection, why));
                    actions.push(Action::Say(format!(
                        "ALARM: a second node claims to be {name}, from {from}; the first, from {here}, answers: the \
                         second was refused"
                    )));
                }
            }
            ToServer::Ready => {
                if node.status == Status::Preparing {
                    node.status = Status::Ready;
                    node.step = "ready".to_owned();
                    self.waiting_since.get_or_insert(time);
                    actions.push(Action::Say(format!("{} is ready", node.name)));
                }
            }
            ToServer::Progress(progress) => {
                let status = wave::Status {
                    held: progress.held,
                    consumed: progress.taken,
                    stuck: progress.stuck,
                    epoch: progress.epoch,
                    cover: progress.cover,
                };
                if let (Some(current), Some(id)) = (&mut self.current, id) {
                    current.braking.reported(id, &progress, time);
                }
                node.progress = progress;
                actions.extend(self.in_wave(id, now, |core, id| core.status(id, status, time)));
            }
            ToServer::Joined(link) => {
                actions.extend(self.in_wave(id, now, |core, id| {
                    core.joined(id, &link, time);
                    Vec::new()
                }));
            }
            ToServer::Lost { link, why } => {
                // After the release parents go as they like, and a link may have been replaced already.
                let current = self.current.as_ref().zip(id);
                if current.is_some_and(|(current, id)| current.core.stands_on(id, &link)) {
                    actions.push(Action::Say(format!("{} lost its parent: {}", node.name, clean(&why, 300))));
                }
                actions.extend(self.in_wave(id, now, |core, id| core.lost(id, &link, time)));
            }
            ToServer::Lacking { link, oldest } => {
                actions.extend(self.in_wave(id, now, |core, id| core.lacking(id, &link, oldest, time)));
            }
            ToServer::Silent { child, link } => {
                actions.extend(self.in_wave(id, now, |core, _| core.silent_link(child, &link, time)));
            }
            ToServer::Damaged { link, chunk, why } => {
                self.damaged += 1;
                actions.push(Action::Say(format!("{} refused a chunk: {}", node.name, clean(&why, 300))));
                actions.extend(self.in_wave(id, now, |core, id| core.damaged(id, &link, chunk, time)));
            }
            ToServer::Ended(record) => {
                node.ended = Some(record);
                if let (Some(current), Some(id)) = (&mut self.current, id) {
                    current.core.ended(id);
                }
            }
            ToServer::Fact { name, value } => {
                if node.facts.len() < 1000 {
                    node.facts.push((clean(&name, 100), clean(&value, 1000)));
                }
            }
            ToServer::Done => {
                if node.status == Status::Running {
                    node.claims_done = true;
                    actions.extend(self.settle(now));
                }
            }
            ToServer::Failed { step, error } => {
                let (step, error) = (clean(&step, 64), clean(&error, 4000));
                actions.extend(self.fail(connection, step, error, now));
            }
        }
        actions
    }

    /// Tells the wave's core something, and does what it says.
    fn in_wave(
        &mut self,
        id: Option<NodeId>,
        now: Instant,
        event: impl FnOnce(&mut Wave, NodeId) -> Vec<wave::Action>,
    ) -> Vec<Action> {
        match (&mut self.current, id) {
            (Some(current), Some(id)) => {
                let orders = event(&mut current.core, id);
                self.carry_out(orders, now)
            }
            _ => Vec::new(),
        }
    }

    /// The head saw something.
    pub fn head_report(&mut self, report: &Report, now: Instant) -> Vec<Action> {
        let time = self.time(now);
        match report {
            Report::Silent(child, link) => {
                self.in_wave(Some(HEAD), now, |core, _| core.silent_link(*child, link, time))
            }
            // The head has no parent.
            Report::Joined(_) | Report::Lost(..) | Report::Lacking(..) | Report::Damaged(..) => Vec::new(),
        }
    }

    /// What the wave's core decided, as messages.
    fn carry_out(&mut self, orders: Vec<wave::Action>, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        for order in orders {
            match order {
                wave::Action::Order(HEAD, place) => actions.push(Action::Head(place)),
                wave::Action::Order(id, place) => actions.extend(self.order(id, place)),
                wave::Action::Dead(id, why) => {
                    let Some(connection) = self.connection_of(id) else { continue };
                    let step = self.node_of(connection).map(|n| n.step.clone()).unwrap_or_default();
                    actions.push(Action::Cut(connection));
                    let lost = self.now;
                    if let Some(node) = self.node_mut(connection).filter(|node| !node.is_final()) {
                        node.lost = Some(lost);
                    }
                    actions.extend(self.fail(connection, step, why, now));
                    self.forget(connection);
                }
                wave::Action::Out(id, why) => actions.extend(self.out(id, &why, now)),
                wave::Action::Say(text) => actions.push(Action::Say(self.with_names(&text))),
            }
        }
        actions
    }

    /// The core knows nodes by number.
    fn with_names(&self, text: &str) -> String {
        let Some(current) = &self.current else { return text.to_owned() };
        let words = text.split(' ').collect::<Vec<_>>();
        let mut out: Vec<String> = Vec::new();
        for word in words {
            let number = word.trim_end_matches([',', ':', ';']).parse().ok().map(NodeId);
            let name = number.and_then(|id| current.names.get(&id));
            match (name, out.last().is_some_and(|last| last == "node")) {
                (Some(name), true) => {
                    out.pop();
                    out.push(name.clone());
                }
                _ => out.push(word.to_owned()),
            }
        }
        out.join(" ")
    }

    fn connection_of(&self, id: NodeId) -> Option<ConnectionId> {
        let name = self.current.as_ref()?.names.get(&id)?;
        self.nodes.get(name).map(|node| node.connection)
    }

    fn order(&mut self, id: NodeId, place: Place) -> Option<Action> {
        let current = self.current.as_mut()?;
        let first = current.placed.insert(id);
        let node = current.names.get(&id).and_then(|name| self.nodes.get(name))?;
        let parent = place.parent.as_ref().and_then(|(parent, _)| current.names.get(parent));
        let parent = parent.and_then(|name| self.nodes.get(name));
        // Without an address: the server itself.
        let addresses = parent.map_or_else(Vec::new, |parent| addresses_for(node, parent));
        let children = place.children.iter().filter_map(|(child, _)| current.names.get(child));
        let children = children
            .filter_map(|name| self.nodes.get(name))
            .flat_map(|child| places_of(child.address, &child.registration))
            .collect();
        let message = if first {
            ToNode::Start(Box::new(Start {
                wave: current.key.clone(),
                me: id,
                nodes: u32::try_from(current.names.len()).unwrap_or(u32::MAX),
                survive: self.settings.survive,
                dead_after: u32::try_from(self.settings.dead_after.as_millis()).unwrap_or(u32::MAX),
                signer: current.signer.as_ref().map(|signer| signer.public()),
                place,
                addresses,
                children,
            }))
        } else {
            ToNode::Place { place, addresses, children }
        };
        Some(Action::Send(node.connection, message))
    }

    /// A node has no place in the wave any more; it gets another wave, or none.
    fn out(&mut self, id: NodeId, why: &str, now: Instant) -> Vec<Action> {
        let Some(connection) = self.connection_of(id) else { return Vec::new() };
        let (tries, time) = (self.settings.tries, self.time(now));
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        if node.is_final() {
            return vec![Action::Send(connection, ToNode::Out(why.to_owned()))];
        }
        if node.tries < tries {
            node.status = Status::Preparing;
            node.spoke = time;
            node.ended = None;
            node.claims_done = false;
            node.step = "next wave".to_owned();
            return vec![
                Action::Say(format!("{} goes to the next wave: {why}", node.name)),
                Action::Send(connection, ToNode::Out(why.to_owned())),
            ];
        }
        let why = format!("{why}, in wave {} of {tries} (--tries)", node.tries);
        let mut actions = vec![Action::Send(connection, ToNode::Abort(why.clone()))];
        actions.extend(self.fail(connection, "receive".to_owned(), why, now));
        actions
    }

    /// Nodes that say they are done: they are, when they hold just the stream that was sent. A node can be done before the
    /// source's own thread has said that everything is sent; it is judged when both are known.
    fn settle(&mut self, now: Instant) -> Vec<Action> {
        let claims: Vec<(ConnectionId, u32, Option<EndRecord>)> = self
            .nodes
            .values()
            .filter(|n| n.claims_done && n.status == Status::Running)
            .map(|n| (n.connection, n.wave, n.ended))
            .collect();
        let mut actions = Vec::new();
        for (connection, wave, held) in claims {
            let Some(sent) = self.sent.get(&wave) else { continue };
            if matches!((sent, held), (Ok(sent), Some(held)) if *sent == held) {
                let name = self.connections.get(&connection);
                let Some(node) = name.and_then(|name| self.nodes.get_mut(name)) else { continue };
                node.status = Status::Done;
                node.until = Some(now);
                actions.push(Action::Say(format!("{} is done", node.name)));
                actions.push(Action::Final(node.name.clone()));
            } else {
                let error = "it says it is done, but does not hold the stream that was sent".to_owned();
                actions.extend(self.fail(connection, "finish".to_owned(), error, now));
            }
        }
        actions
    }

    fn fail(&mut self, connection: ConnectionId, step: String, error: String, now: Instant) -> Vec<Action> {
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        if node.is_final() {
            return Vec::new();
        }
        let name = node.name.clone();
        let say = format!("{name} FAILED in step {step}: {error}");
        node.status = Status::Failed { step, error };
        node.until = Some(now);
        if let Some(current) = &mut self.current
            && let Some(id) = current.ids.get(&name)
        {
            current.core.failed(*id);
        }
        vec![Action::Say(say), Action::Final(name)]
    }

    fn node_mut(&mut self, connection: ConnectionId) -> Option<&mut Node> {
        self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name))
    }

    fn forget(&mut self, connection: ConnectionId) {
        if let Some(node) = self.connections.remove(&connection).and_then(|name| self.nodes.get_mut(&name)) {
            node.connected = false;
        }
    }

    /// A connection is gone. While its wave runs the node is dead; before its first it is forgotten until it comes again;
    /// between two waves and later it has failed.
    pub fn closed(&mut self, connection: ConnectionId, why: &str, now: Instant) -> Vec<Action> {
        self.claims.closed(connection);
        let lost = self.now;
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        let waits = matches!(node.status, Status::Preparing | Status::Ready);
        // One that was in a wave already is owed an end, and its waves are counted on when it comes again.
        let unknown = waits && node.tries == 0;
        node.connected = false;
        if !node.is_final() {
            node.lost = Some(lost);
        }
        let (name, step, known) = (node.name.clone(), node.step.clone(), node.is_final());
        let why = format!("the connection was lost: {why}");
        let mut actions = Vec::new();
        let id = self.current.as_ref().and_then(|current| current.ids.get(&name)).copied();
        // Also one that has failed is a relay whose children need another parent.
        actions.extend(self.in_wave(id, now, |core, id| core.gone(id, &why)));
        if unknown {
            actions.push(Action::Say(format!("{name} went away: {why}")));
            self.nodes.remove(&name);
        } else if !known {
            actions.extend(self.fail(connection, step, why, now));
        }
        self.connections.remove(&connection);
        self.releasing.retain(|waiting| *waiting != connection);
        actions
    }

    /// The source of the last wave is through, or failed.
    pub fn fed(&mut self, result: Result<EndRecord, String>) -> Vec<Action> {
        let say = match &result {
            Ok(record) => format!("everything was sent: {} bytes in {} chunks", record.bytes, record.chunks),
            Err(e) => format!("SENDING FAILED: {e}"),
        };
        self.sent.insert(self.waves, result);
        vec![Action::Say(say)]
    }

    /// Time passed: starts, releases, declares the silent dead.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        let time = self.time(now);
        let mut actions = self.settle(now);
        // Those whose stream flows are judged by the wave.
        let flows = |n: &Node| self.current.as_ref().is_some_and(|c| c.ids.contains_key(&n.name));
        let silent: Vec<(ConnectionId, Duration)> = self
            .nodes
            .values()
            .filter(|n| n.connected && !flows(n))
            .filter_map(|n| {
                // After the release nobody depends on a node any more, and a machine that is being configured may be busy.
                // What still takes the stream to its disk is judged as before.
                let known = n.status == Status::Running || self.releasing.contains(&n.connection);
                let patient = known && n.step != "receive";
                let endured =
                    self.settings.dead_after.max(if patient { AFTER_RELEASE } else { Duration::ZERO });
                (time.saturating_sub(n.heard) >= endured).then_some((n.connection, endured))
            })
            .collect();
        for (connection, endured) in silent {
            let why = format!("it was silent for {} s", endured.as_secs());
            actions.push(Action::Cut(connection));
            actions.extend(self.closed(connection, &why, now));
        }
        actions.extend(self.fail_the_hung(time, now));
        if let Some(current) = &mut self.current {
            let orders = current.core.tick(time);
            actions.extend(self.carry_out(orders, now));
        }
        let nodes = &self.nodes;
        for claim in self.claims.freed(|name| nodes.get(name).is_some_and(|node| node.connected)) {
            actions.push(Action::Say(format!(
                "{} said nothing; the one from {} takes its place",
                claim.name, claim.address
            )));
            actions.extend(self.register(claim, now));
        }
        actions.extend(self.judge_brake(time));
        if self.current.is_none() && self.may_start(time) {
            match self.start(now, time) {
                Ok(more) => actions.extend(more),
                Err(e) => actions.push(Action::Say(format!("starting failed: {e}"))),
            }
        }
        if self.may_release() {
            actions.extend(self.release(now, time));
        }
        actions.extend(self.release_next(time));
        actions
    }

    /// Nodes that do not get ready for the next wave: nobody may wait for them for ever.
    fn fail_the_hung(&mut self, time: Time, now: Instant) -> Vec<Action> {
        if self.waves == 0 {
            return Vec::new();
        }
        let hung = |n: &&Node| {
            let quiet = time.saturating_sub(n.spoke) >= NEXT_READY;
            n.connected && n.status == Status::Preparing && quiet
        };
        let hung: Vec<_> = self.nodes.values().filter(hung).map(|n| (n.connection, n.step.clone())).collect();
        let mut actions = Vec::new();
        for (connection, step) in hung {
            let why =
                format!("it did not get ready for the next wave: no word for {} s", NEXT_READY.as_secs());
            actions.push(Action::Send(connection, ToNode::Abort(why.clone())));
            actions.extend(self.fail(connection, step, why, now));
        }
        actions
    }

    /// Whether the deployment is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let all_final = !self.nodes.is_empty() && self.nodes.values().all(Node::is_final);
        match self.started {
            Some(_) => {
                all_final && self.current.is_none() && self.releasing.is_empty() && !self.may_come_again()
            }
            // All that were waited for failed before the start.
            None => all_final && self.settings.nodes.is_some_and(|n| self.nodes.len() >= n as usize),
        }
    }

    /// Whether a node whose connection was lost in a wave may still come for another.
    fn may_come_again(&self) -> bool {
        let alone = self.nodes.values().all(|n| n.lost.is_some() || !n.connected && n.status != Status::Done);
        let patience = if alone { RETURN_OF_ALL } else { RETURN };
        let waited = |since: Time| self.now.saturating_sub(since) >= patience;
        let mut lost = self.nodes.values().filter(|n| n.tries < self.settings.tries);
        lost.any(|n| n.lost.is_some_and(|since| !waited(since)))
    }

    /// Whether a node of this name was here, is not, and had no success.
    #[must_use]
    pub fn is_gone(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| !node.connected && node.status != Status::Done)
    }

    /// Installed and failed nodes.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let done = self.nodes.values().filter(|n| n.status == Status::Done).count();
        (done, self.nodes.values().filter(|n| matches!(n.status, Status::Failed { .. })).count())
    }

    /// How long the stream took, from the start to the release.
    #[must_use]
    pub fn stream_time(&self, now: Instant) -> Option<Duration> {
        self.started.map(|s| self.released.unwrap_or(now).saturating_duration_since(s))
    }
}

fn refuse(connection: ConnectionId, why: String) -> Vec<Action> {
    vec![Action::Send(connection, ToNode::Refused(why)), Action::Close(connection)]
}

/// Text from a node, as it may be shown: no control characters, not too long.
#[must_use]
pub fn clean(text: &str, longest: usize) -> String {
    text.chars().take(longest).map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// Whether the node wants an installation.
#[must_use]
pub fn installs(registration: &Registration) -> bool {
    registration.purpose == Purpose::Install
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

#[cfg(test)]
mod returning_tests;
