//! The deployment's decisions as plain state: what nodes and the source say goes in, what is to be sent comes out. No
//! sockets, no clock of its own; the loop in `run` feeds it.

use super::command::{Order, Settings};
use ka_chain::control::{Progress, Purpose, Registration, Start, ToNode, ToServer};
use ka_chain::core::wave::{self, Standing};
use ka_chain::core::{Clock, HEAD, NodeId, Place, Time, wave::Wave};
use ka_chain::node::Report;
use ka_chain::seal::{self, random};
use ka_chain::sign::Signer;
use ka_chain::stream::EndRecord;
use ka_chain::topology;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the nodes that are owed another wave wait for each other, when `--wait` does not say.
const NEXT_WAVE: Duration = Duration::from_secs(60);
/// How long a node that is owed another wave may go without a word about getting ready: its disk may be hung while its
/// machine answers pings.
const NEXT_READY: Duration = Duration::from_secs(300);
/// How long a node may be silent after the release.
const AFTER_RELEASE: Duration = Duration::from_secs(60);

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
}

/// The deployment.
#[derive(Debug)]
pub struct Deployment {
    settings: Settings,
    id: [u8; 16],
    /// The nodes by name.
    pub nodes: BTreeMap<String, Node>,
    connections: BTreeMap<ConnectionId, String>,
    clock: Clock,
    begun: Instant,
    first_ready: Option<Time>,
    current: Option<Current>,
    /// Waves that have begun.
    pub waves: u32,
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
            clock: Clock::default(),
            begun: now,
            first_ready: None,
            current: None,
            waves: 0,
            started: None,
            released: None,
            sent: BTreeMap::new(),
        }
    }

    fn time(&mut self, now: Instant) -> Time {
        self.clock.advance(now.saturating_duration_since(self.begun))
    }

    /// What the last wave's source sent, once it is all sent; or why it failed.
    #[must_use]
    pub fn last_sent(&self) -> Option<&Result<EndRecord, String>> {
        self.sent.get(&self.waves)
    }

    /// Lets a node in under `name`, or refuses it. `order` is what it is to become.
    pub fn register(
        &mut self,
        connection: ConnectionId,
        name: String,
        address: IpAddr,
        registration: Registration,
        order: Vec<u8>,
        now: Instant,
    ) -> Vec<Action> {
        let time = self.time(now);
        let mut actions = Vec::new();
        if let Some(old) = self.nodes.get(&name) {
            if old.connected && !old.is_final() {
                let why = format!("a node named {name} is here already, from {}", old.address);
                return vec![
                    Action::Send(connection, ToNode::Refused(why)),
                    Action::Close(connection),
                    Action::Say(format!(
                        "ALARM: a second node claims to be {name}, from {address}; it was refused"
                    )),
                ];
            }
            // It was power-cycled, or failed and came again.
            let tries = old.tries;
            if tries >= self.settings.tries {
                let why = format!("{name} was in {tries} waves already (--tries)");
                return vec![
                    Action::Send(connection, ToNode::Refused(why.clone())),
                    Action::Close(connection),
                    Action::Say(format!("{address} was refused: {why}")),
                ];
            }
            actions.push(Action::Say(format!("{name} is here again, from {address}")));
            actions.push(Action::Close(old.connection));
            self.connections.remove(&old.connection);
        }
        let late = if self.waves > 0 { ", for the next wave" } else { "" };
        actions.push(Action::Say(format!("{name} registered from {address}{late}")));
        let tries = self.nodes.get(&name).map_or(0, |old| old.tries);
        let node = Node {
            connection,
            connected: true,
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
            spoke: time,
            since: now,
            until: None,
        };
        self.connections.insert(connection, name.clone());
        self.nodes.insert(name.clone(), node);
        actions.push(Action::Send(connection, ToNode::Order { name, body: order }));
        actions
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
            ToServer::Log { .. } | ToServer::Pong(_) => {}
            ToServer::Ready => {
                if node.status == Status::Preparing {
                    node.status = Status::Ready;
                    node.step = "ready".to_owned();
                    self.first_ready.get_or_insert(time);
                    actions.push(Action::Say(format!("{} is ready", node.name)));
                }
            }
            ToServer::Progress(progress) => {
                node.progress = progress;
                let status =
                    wave::Status { held: progress.held, consumed: progress.taken, stuck: progress.stuck };
                actions.extend(self.in_wave(id, now, |core, id| core.status(id, status, time)));
            }
            ToServer::Joined(link) => {
                actions.extend(self.in_wave(id, now, |core, id| {
                    core.joined(id, &link, time);
                    Vec::new()
                }));
            }
            ToServer::Lost { link, why } => {
                actions.push(Action::Say(format!("{} lost its parent: {}", node.name, clean(&why, 300))));
                actions.extend(self.in_wave(id, now, |core, id| core.lost(id, &link, time)));
            }
            ToServer::Lacking { link, oldest } => {
                actions.extend(self.in_wave(id, now, |core, id| core.lacking(id, &link, oldest, time)));
            }
            ToServer::Silent { child, link } => {
                actions.extend(self.in_wave(id, now, |core, _| core.silent_link(child, &link, time)));
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
            Report::Joined(_) | Report::Lost(..) | Report::Lacking(..) => Vec::new(),
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
            }))
        } else {
            ToNode::Place { place, addresses }
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

    fn forget(&mut self, connection: ConnectionId) {
        if let Some(node) = self.connections.remove(&connection).and_then(|name| self.nodes.get_mut(&name)) {
            node.connected = false;
        }
    }

    /// A connection is gone. While its wave runs the node is dead; before the node may come again; later it has failed.
    pub fn closed(&mut self, connection: ConnectionId, why: &str, now: Instant) -> Vec<Action> {
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        node.connected = false;
        let (name, step, known) = (node.name.clone(), node.step.clone(), node.is_final());
        let waited = matches!(node.status, Status::Preparing | Status::Ready);
        let why = format!("the connection was lost: {why}");
        let mut actions = Vec::new();
        let id = self.current.as_ref().and_then(|current| current.ids.get(&name)).copied();
        // Also one that has failed is a relay whose children need another parent.
        actions.extend(self.in_wave(id, now, |core, id| core.gone(id, &why)));
        if !known && waited {
            actions.push(Action::Say(format!("{name} went away: {why}")));
            self.nodes.remove(&name);
        } else if !known {
            actions.extend(self.fail(connection, step, why, now));
        }
        self.connections.remove(&connection);
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
                // After the release nobody depends on a node any more, and a machine that writes its disk's last blocks
                // may be busy.
                let running = n.status == Status::Running;
                let endured =
                    self.settings.dead_after.max(if running { AFTER_RELEASE } else { Duration::ZERO });
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
        if self.current.is_none() && self.may_start(time) {
            match self.start(now, time) {
                Ok(more) => actions.extend(more),
                Err(e) => actions.push(Action::Say(format!("starting failed: {e}"))),
            }
        }
        if self.may_release() {
            actions.extend(self.release(now));
        }
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

    fn may_start(&self, time: Time) -> bool {
        let count = |test: &dyn Fn(&Node) -> bool| self.nodes.values().filter(|n| test(n)).count();
        let ready = count(&|n| n.status == Status::Ready);
        if ready == 0 {
            return false;
        }
        let waited = |wait: Duration| {
            self.first_ready.is_some_and(|first| time.saturating_sub(first) >= wait)
                && ready >= self.settings.min_nodes as usize
        };
        if self.waves > 0 {
            let owed = count(&|n| n.status == Status::Preparing);
            return owed == 0 || waited(self.settings.wait.unwrap_or(NEXT_WAVE));
        }
        // A node that failed before the start will not become ready: nobody waits for it.
        let failed = count(&Node::is_final);
        let all = self.settings.nodes.is_some_and(|n| ready + failed >= n as usize);
        all || self.settings.wait.is_some_and(waited)
    }

    fn start(&mut self, now: Instant, time: Time) -> Result<Vec<Action>, ka_chain::Error> {
        let number = self.waves + 1;
        let key = seal::Wave::new(self.id, number)?;
        let signer = match self.settings.trust_nodes {
            true => None,
            false => Some(Arc::new(Signer::new(&key)?)),
        };
        let mut ready: Vec<&Node> = self.nodes.values().filter(|n| n.status == Status::Ready).collect();
        match self.settings.order {
            Order::Arrival => ready.sort_by_key(|n| n.connection),
            Order::Ip => {
                let addresses: Vec<IpAddr> = ready.iter().map(|n| n.address).collect();
                ready = topology::by_address(&addresses).into_iter().map(|i| ready[i]).collect();
            }
        }
        let order: Vec<String> = ready.iter().map(|n| n.name.clone()).collect();
        let count = u32::try_from(order.len()).unwrap_or(u32::MAX);
        let names: BTreeMap<NodeId, String> = (1..=count).map(NodeId).zip(order.iter().cloned()).collect();
        let ids = names.iter().map(|(id, name)| (name.clone(), *id)).collect();
        let settings = wave::Settings {
            arity: self.settings.arity,
            survive: self.settings.survive,
            dead_after: self.settings.dead_after,
            stall: self.settings.stall,
        };
        let core = Wave::new(settings, count, random()?, time);
        let which = if number == 1 { String::new() } else { format!("wave {number}, ") };
        let mut actions = vec![
            Action::Say(format!("starting {which}with {count} nodes: {}", order.join(" "))),
            // The links must be known before the first child dials.
            Action::Feed(key.clone(), signer.clone()),
        ];
        for name in &order {
            if let Some(node) = self.nodes.get_mut(name) {
                node.status = Status::Running;
                node.wave = number;
                node.tries += 1;
                node.progress = Progress::default();
            }
        }
        let mut current = Current { core, key, signer, names, ids, placed: BTreeSet::new() };
        let orders = current.core.begin();
        self.current = Some(current);
        self.waves = number;
        self.first_ready = None;
        self.started.get_or_insert(now);
        self.released = None;
        actions.extend(self.carry_out(orders, now));
        Ok(actions)
    }

    /// Every living node of the wave holds the end, or failed; and the source knows what the end is.
    fn may_release(&self) -> bool {
        let Some(current) = &self.current else { return false };
        let all_final = current.ids.iter().all(|(name, id)| {
            current.core.standing(*id) != Some(Standing::In)
                || self.nodes.get(name).is_none_or(Node::is_final)
        });
        (self.sent.contains_key(&self.waves) && current.core.may_release()) || all_final
    }

    fn release(&mut self, now: Instant) -> Vec<Action> {
        let Some(current) = self.current.take() else { return Vec::new() };
        self.released = Some(now);
        let mut actions: Vec<Action> = current
            .ids
            .iter()
            .filter(|(_, id)| current.core.standing(**id) == Some(Standing::In))
            .filter_map(|(name, _)| self.nodes.get(name))
            .filter(|node| node.connected)
            .map(|node| Action::Send(node.connection, ToNode::Release))
            .collect();
        actions.push(Action::CloseHead);
        actions
    }

    /// Whether the deployment is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let all_final = !self.nodes.is_empty() && self.nodes.values().all(Node::is_final);
        match self.started {
            Some(_) => all_final && self.current.is_none(),
            // All that were waited for failed before the start.
            None => all_final && self.settings.nodes.is_some_and(|n| self.nodes.len() >= n as usize),
        }
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

/// Where `child` tries to reach `parent`: the address that the server sees first, then the others that it reported.
/// Loopback only when both are on one host.
fn addresses_for(child: &Node, parent: &Node) -> Vec<SocketAddr> {
    let port = parent.registration.data_port;
    let mut addresses = Vec::new();
    let seen = parent.address.to_canonical();
    if seen.is_loopback() {
        if child.address.to_canonical().is_loopback() {
            addresses.push(seen);
        }
    } else {
        addresses.push(seen);
    }
    addresses.extend(
        parent
            .registration
            .addresses
            .iter()
            .map(IpAddr::to_canonical)
            .filter(|a| !a.is_loopback() && !a.is_unspecified()),
    );
    if addresses.is_empty() {
        addresses.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let mut unique: Vec<SocketAddr> = Vec::new();
    for address in addresses {
        let address = SocketAddr::new(address, port);
        if !unique.contains(&address) && unique.len() < 16 {
            unique.push(address);
        }
    }
    unique
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
