//! The deployment's decisions as plain state: what nodes and the source say goes in, what is to be sent comes out. No
//! sockets, no clock of its own; the loop in `run` feeds it.

use super::command::{Order, Settings};
use ka_chain::control::{Progress, Purpose, Registration, Start, ToNode, ToServer};
use ka_chain::link::LinkId;
use ka_chain::seal::{Wave, random};
use ka_chain::stream::EndRecord;
use ka_chain::topology::{self, Parent};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

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
    /// Whether it has a place in the wave.
    pub in_wave: bool,
    /// Facts for the summary.
    pub facts: Vec<(String, String)>,
    /// When it was last heard.
    pub heard: Instant,
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
    /// Begin to feed the chain: these links lead from the server.
    Feed(Wave, Vec<LinkId>),
    /// Close a connection.
    Close(ConnectionId),
    /// Tell the operator.
    Say(String),
    /// A node's state became final, for the boot service.
    Final(String),
}

/// The deployment.
#[derive(Debug)]
pub struct Deployment {
    settings: Settings,
    id: [u8; 16],
    /// The nodes by name.
    pub nodes: BTreeMap<String, Node>,
    connections: BTreeMap<ConnectionId, String>,
    first_ready: Option<Instant>,
    /// When the stream began.
    pub started: Option<Instant>,
    /// When every node held the end of the stream.
    pub released: Option<Instant>,
    /// What the source sent, once it is all sent; or why it failed.
    pub fed: Option<Result<EndRecord, String>>,
}

impl Deployment {
    /// A deployment without nodes.
    #[must_use]
    pub fn new(settings: Settings, id: [u8; 16]) -> Self {
        Self {
            settings,
            id,
            nodes: BTreeMap::new(),
            connections: BTreeMap::new(),
            first_ready: None,
            started: None,
            released: None,
            fed: None,
        }
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
        if self.started.is_some() {
            let why = "the deployment has begun without this node";
            return vec![
                Action::Send(connection, ToNode::Refused(why.to_owned())),
                Action::Close(connection),
                Action::Say(format!("{name} ({address}) came too late and was refused")),
            ];
        }
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
            actions.push(Action::Say(format!("{name} is here again, from {address}")));
            actions.push(Action::Close(old.connection));
            self.connections.remove(&old.connection);
        }
        actions.push(Action::Say(format!("{name} registered from {address}")));
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
            in_wave: false,
            facts: Vec::new(),
            heard: now,
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
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        node.heard = now;
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
                if node.status == Status::Preparing && self.started.is_none() {
                    node.status = Status::Ready;
                    node.step = "ready".to_owned();
                    self.first_ready.get_or_insert(now);
                    actions.push(Action::Say(format!("{} is ready", node.name)));
                }
            }
            ToServer::Progress(progress) => node.progress = progress,
            ToServer::Ended(record) => node.ended = Some(record),
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

    /// Nodes that say they are done: they are, when they hold just the stream that was sent. A node can be done before the
    /// source's own thread has said that everything is sent; it is judged when both are known.
    fn settle(&mut self, now: Instant) -> Vec<Action> {
        let Some(sent) = self.fed.clone() else { return Vec::new() };
        let claims: Vec<(ConnectionId, Option<EndRecord>)> = self
            .nodes
            .values()
            .filter(|n| n.claims_done && n.status == Status::Running)
            .map(|n| (n.connection, n.ended))
            .collect();
        let mut actions = Vec::new();
        for (connection, held) in claims {
            if matches!((&sent, held), (Ok(sent), Some(held)) if *sent == held) {
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
        vec![Action::Say(say), Action::Final(name)]
    }

    /// A connection is gone. Before the start the node may come again; later it has failed.
    pub fn closed(&mut self, connection: ConnectionId, why: &str, now: Instant) -> Vec<Action> {
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return Vec::new();
        };
        node.connected = false;
        let (name, step, known) = (node.name.clone(), node.step.clone(), node.is_final());
        let in_wave = node.in_wave;
        let mut actions = Vec::new();
        if !known && in_wave {
            actions = self.fail(connection, step, format!("the connection was lost: {why}"), now);
        } else if !known {
            actions.push(Action::Say(format!("{name} went away: {why}")));
            self.nodes.remove(&name);
        }
        self.connections.remove(&connection);
        actions
    }

    /// The source is through, or failed.
    pub fn fed(&mut self, result: Result<EndRecord, String>) -> Vec<Action> {
        let say = match &result {
            Ok(record) => format!("everything was sent: {} bytes in {} chunks", record.bytes, record.chunks),
            Err(e) => format!("SENDING FAILED: {e}"),
        };
        self.fed = Some(result);
        vec![Action::Say(say)]
    }

    /// Time passed: starts, releases, declares the silent dead.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = self.settle(now);
        // After the release nobody depends on a node any more, and a machine that writes its disk's last blocks may be busy.
        let endured = match self.released {
            Some(_) => self.settings.dead_after.max(AFTER_RELEASE),
            None => self.settings.dead_after,
        };
        let silent: Vec<ConnectionId> = self
            .nodes
            .values()
            .filter(|n| n.connected && now.saturating_duration_since(n.heard) >= endured)
            .map(|n| n.connection)
            .collect();
        for connection in silent {
            let why = format!("it was silent for {} s", endured.as_secs());
            actions.push(Action::Close(connection));
            actions.extend(self.closed(connection, &why, now));
        }
        if self.started.is_none() && self.may_start(now) {
            match self.start(now) {
                Ok(more) => actions.extend(more),
                Err(e) => actions.push(Action::Say(format!("starting failed: {e}"))),
            }
        }
        if self.started.is_some() && self.released.is_none() && self.may_release() {
            self.released = Some(now);
            actions.extend(
                self.nodes
                    .values()
                    .filter(|n| n.connected)
                    .map(|n| Action::Send(n.connection, ToNode::Release)),
            );
        }
        actions
    }

    fn may_start(&self, now: Instant) -> bool {
        let ready = self.nodes.values().filter(|n| n.status == Status::Ready).count();
        let failed = self.nodes.values().filter(|n| n.is_final()).count();
        if ready == 0 {
            return false;
        }
        // A node that failed before the start will not become ready: nobody waits for it.
        let all = self.settings.nodes.is_some_and(|n| ready + failed >= n as usize);
        let waited = match (self.settings.wait, self.first_ready) {
            (Some(wait), Some(first)) => {
                now.saturating_duration_since(first) >= wait && ready >= self.settings.min_nodes as usize
            }
            _ => false,
        };
        all || waited
    }

    fn start(&mut self, now: Instant) -> Result<Vec<Action>, ka_chain::Error> {
        let wave = Wave::new(self.id, 1)?;
        let mut ready: Vec<&Node> = self.nodes.values().filter(|n| n.status == Status::Ready).collect();
        match self.settings.order {
            Order::Arrival => ready.sort_by_key(|n| n.connection),
            Order::Ip => {
                let addresses: Vec<IpAddr> = ready.iter().map(|n| n.address).collect();
                ready = topology::by_address(&addresses).into_iter().map(|i| ready[i]).collect();
            }
        }
        let parents = topology::parents(ready.len(), self.settings.arity);
        let children = topology::children(&parents);
        let links = ready.iter().map(|_| random()).collect::<Result<Vec<LinkId>, _>>()?;
        let count = u32::try_from(ready.len()).unwrap_or(u32::MAX);
        let mut actions = Vec::new();
        let mut first = Vec::new();
        let order: Vec<&str> = ready.iter().map(|n| n.name.as_str()).collect();
        actions.push(Action::Say(format!("starting with {count} nodes: {}", order.join(" "))));
        for (position, node) in ready.iter().enumerate() {
            let parent = match parents[position] {
                Parent::Server => {
                    first.push(links[position]);
                    Vec::new()
                }
                Parent::Node(p) => addresses_for(node, ready[p]),
            };
            let start = Start {
                wave: wave.clone(),
                position: u32::try_from(position).unwrap_or(u32::MAX),
                nodes: count,
                parent,
                link: links[position],
                children: children[position].iter().map(|c| links[*c]).collect(),
            };
            actions.push(Action::Send(node.connection, ToNode::Start(Box::new(start))));
        }
        let names: Vec<String> = ready.iter().map(|n| n.name.clone()).collect();
        for name in names {
            if let Some(node) = self.nodes.get_mut(&name) {
                node.status = Status::Running;
                node.in_wave = true;
            }
        }
        // The links must be known before the first child dials.
        actions.insert(0, Action::Feed(wave, first));
        self.started = Some(now);
        Ok(actions)
    }

    /// Every living node of the wave holds the end, or failed; and the source knows what the end is.
    fn may_release(&self) -> bool {
        self.fed.is_some()
            && self
                .nodes
                .values()
                .filter(|n| n.in_wave && n.connected)
                .all(|n| n.ended.is_some() || n.is_final())
    }

    /// Whether the deployment is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let all_final = !self.nodes.is_empty() && self.nodes.values().all(Node::is_final);
        match self.started {
            Some(_) => all_final && self.released.is_some(),
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
