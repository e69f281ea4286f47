//! Control connections, the server's thread that serves them, and what a node does on them.

use super::world::{State, World};
use crate::core::relay::Change;
use crate::core::wave::{Action, Status};
use crate::core::{HEAD, NodeId, Place};
use crate::link::LinkId;
use std::collections::VecDeque;
use std::time::Duration;

/// From the server to a node.
#[derive(Debug, Clone)]
pub(super) enum ToNode {
    Ping,
    Place(Place),
    Out,
    Closed,
}

/// From a node to the server.
#[derive(Debug, Clone, Copy)]
pub(super) enum ToServer {
    Pong,
    Status(Status),
    Joined(LinkId),
    Lost(LinkId),
    Lacking(LinkId, u64),
    Silent(NodeId, LinkId),
    Damaged(LinkId, u64),
    Ended,
    Closed,
}

/// A control connection: what is under way, with the time of its arrival.
#[derive(Debug)]
pub(super) struct Wire {
    to_node: VecDeque<(u64, ToNode)>,
    to_server: VecDeque<(u64, ToServer)>,
    /// The most that a message takes, in ms.
    pub(super) delay: u64,
    /// Slower until, by so many ms.
    pub(super) slow: (u64, u64),
    /// The server's end is open.
    open: bool,
    next_ping: u64,
    /// When the node last heard the server.
    heard: Duration,
    /// Orders that were sent.
    pub(super) orders: Vec<Place>,
}

impl Wire {
    pub(super) fn new(delay: u64) -> Self {
        Self {
            to_node: VecDeque::new(),
            to_server: VecDeque::new(),
            delay,
            slow: (0, 0),
            open: true,
            next_ping: 0,
            heard: Duration::ZERO,
            orders: Vec::new(),
        }
    }
}

/// How long a node stays without a word of the server.
const GIVES_UP: Duration = Duration::from_secs(60);

impl World {
    fn control_arrival(&mut self, node: usize) -> u64 {
        let (until, extra) = self.wires[node].slow;
        let slow = if self.now < until { extra } else { 0 };
        self.now + self.chance.within(0, self.wires[node].delay) + slow
    }

    pub(super) fn tell(&mut self, node: usize, message: ToNode) {
        if !self.wires[node].open {
            return;
        }
        let at = self.control_arrival(node);
        let at = self.wires[node].to_node.back().map_or(at, |(last, _)| at.max(*last));
        self.wires[node].to_node.push_back((at, message));
        self.wake(node, at);
    }

    pub(super) fn report(&mut self, node: usize, message: ToServer) {
        let at = self.control_arrival(node);
        let at = self.wires[node].to_server.back().map_or(at, |(last, _)| at.max(*last));
        if !matches!(message, ToServer::Pong | ToServer::Status(_)) {
            self.note(|| format!("node {node} says {}", short(&message)));
        }
        self.wires[node].to_server.push_back((at, message));
        self.wake(0, at);
    }

    /// The node's kernel closes its end; now and then what was under way is lost.
    pub(super) fn close_control(&mut self, node: usize) {
        if self.chance.percent(50) {
            let now = self.now;
            self.wires[node].to_server.retain(|(at, _)| *at <= now);
        }
        self.report(node, ToServer::Closed);
    }

    /// The server: what has arrived, then the time that has passed; now and then the other way round, as its threads
    /// may do after a pause.
    pub(super) fn serve_nodes(&mut self, ticks: bool) {
        let now = self.hosts[0].time;
        if ticks && self.chance.percent(30) {
            let actions = self.wave.tick(now);
            self.act(actions);
        }
        for node in 1..self.wires.len() {
            while let Some((at, _)) = self.wires[node].to_server.front()
                && self.arrived(node, 0, *at)
                && let Some((_, message)) = self.wires[node].to_server.pop_front()
            {
                if self.wires[node].open {
                    self.serve(node, &message);
                }
            }
        }
        if !ticks {
            return;
        }
        let head = &self.hosts[0].relay;
        let status = Status { epoch: head.epoch(), cover: head.cover(), ..Status::default() };
        self.wave.head_status(status);
        let actions = self.wave.tick(now);
        self.act(actions);
        for node in 1..self.wires.len() {
            if self.now >= self.wires[node].next_ping {
                self.wires[node].next_ping = self.now + 1_000;
                self.tell(node, ToNode::Ping);
            }
            if self.plan.repeats && !self.wires[node].orders.is_empty() && self.chance.percent(2) {
                let again = self.chance.pick(&(0..self.wires[node].orders.len()).collect::<Vec<_>>());
                let order = self.wires[node].orders[again].clone();
                self.tell(node, ToNode::Place(order));
            }
        }
        self.check_cover();
        if self.pushed == self.plan.total && self.wave.may_release() {
            self.check_release();
            self.wave.release();
            self.released = true;
            self.note(|| "released".to_owned());
        }
    }

    fn serve(&mut self, node: usize, message: &ToServer) {
        let (id, now) = (NodeId(node as u32), self.hosts[0].time);
        let actions = match message {
            ToServer::Pong => {
                self.wave.heard(id, now);
                return;
            }
            ToServer::Status(status) => self.wave.status(id, *status, now),
            ToServer::Joined(link) => {
                self.wave.joined(id, link, now);
                return;
            }
            ToServer::Lost(link) => self.wave.lost(id, link, now),
            ToServer::Lacking(link, oldest) => {
                self.check_lacking(node, link);
                self.wave.lacking(id, link, *oldest, now)
            }
            ToServer::Silent(child, link) => self.wave.silent_link(*child, link, now),
            ToServer::Damaged(link, chunk) => self.wave.damaged(id, link, *chunk, now),
            ToServer::Ended => {
                self.wave.ended(id);
                return;
            }
            ToServer::Closed => {
                self.wires[node].open = false;
                self.wave.gone(id, "its connection was closed")
            }
        };
        self.act(actions);
    }

    /// What the wave asks for.
    pub(super) fn act(&mut self, actions: Vec<Action>) {
        if actions.is_empty() {
            return;
        }
        for action in actions {
            match action {
                Action::Order(HEAD, place) => {
                    self.note(|| format!("order to the head {}", shown(&place)));
                    self.oracle.ordered(0, &place, self.now);
                    self.obey(0, place);
                }
                Action::Order(node, place) => {
                    let node = node.0 as usize;
                    self.note(|| format!("order to {node} {}", shown(&place)));
                    self.oracle.ordered(node, &place, self.now);
                    self.wires[node].orders.push(place.clone());
                    self.tell(node, ToNode::Place(place));
                }
                Action::Dead(node, why) => {
                    let node = node.0 as usize;
                    self.note(|| format!("DEAD {node}: {why}"));
                    self.check_dead(node, &why);
                    self.tell(node, ToNode::Closed);
                    self.wires[node].open = false;
                }
                Action::Out(node, why) => {
                    let node = node.0 as usize;
                    self.note(|| format!("OUT {node}: {why}"));
                    self.check_out(node, &why);
                    self.tell(node, ToNode::Out);
                }
                Action::Say(text) => {
                    self.note(|| text.clone());
                    self.check_said(&text);
                }
            }
        }
        self.check_table();
    }

    /// A node hears the server.
    pub(super) fn hear_server(&mut self, host: usize) {
        while let Some((at, _)) = self.wires[host].to_node.front()
            && self.arrived(0, host, *at)
            && let Some((_, message)) = self.wires[host].to_node.pop_front()
        {
            self.wires[host].heard = self.hosts[host].time;
            match message {
                ToNode::Ping => self.report(host, ToServer::Pong),
                ToNode::Place(place) => self.obey(host, place),
                ToNode::Out => {
                    self.leave(host);
                    return;
                }
                ToNode::Closed => {
                    self.leave(host);
                    return;
                }
            }
        }
        if self.hosts[host].time.saturating_sub(self.wires[host].heard) >= GIVES_UP {
            self.leave(host);
            self.close_control(host);
        }
    }

    fn leave(&mut self, host: usize) {
        self.note(|| format!("node {host} leaves"));
        self.hosts[host].state = State::Left;
        self.close_all(host, false);
    }

    /// An order is obeyed, and the I/O does what it asks for.
    fn obey(&mut self, host: usize, place: Place) {
        self.check_window(host);
        let now = self.hosts[host].time;
        let changes = self.hosts[host].relay.place(place.clone(), now);
        if self.hosts[host].obeyed.as_ref().is_none_or(|old| old.epoch < place.epoch) {
            self.hosts[host].obeyed = Some(place);
            self.oracle.topology_changed = self.now;
        }
        for change in changes {
            self.note(|| format!("host {host} does {change:?}"));
            match change {
                Change::CloseParent(link) => self.close_link(host, &link, false),
                Change::CloseChild(_, link) => self.close_link(host, &link, true),
                Change::Dial(parent, link) => self.dial(host, parent.0 as usize, link.id),
            }
        }
        self.acknowledge_again(host);
        self.wake(host, self.now);
    }

    /// Twice a second a node says how far it is, and once that it holds the end.
    pub(super) fn say_status(&mut self, host: usize) {
        if self.hosts[host].relay.is_complete() && !self.hosts[host].ended_said {
            self.hosts[host].ended_said = true;
            self.report(host, ToServer::Ended);
        }
        if self.now >= self.hosts[host].next_status {
            self.hosts[host].next_status = self.now + 500;
            let relay = &self.hosts[host].relay;
            let consumed = self.hosts[host].consumer.next;
            let status = Status {
                held: relay.end(),
                consumed,
                stuck: relay.stuck(),
                epoch: relay.epoch(),
                cover: relay.cover(),
            };
            self.report(host, ToServer::Status(status));
        }
    }

    /// Children that say nothing, found on a tick.
    pub(super) fn find_silent(&mut self, host: usize) {
        let now = self.hosts[host].time;
        for child in self.hosts[host].relay.silent(now, self.plan.settings.dead_after) {
            self.note(|| format!("host {host} hears nothing of its child {}", child.0));
            let Some(link) = self.hosts[host].relay.link_to(child).map(|link| link.id) else { continue };
            if host == 0 {
                let actions = self.wave.silent_link(child, &link, now);
                self.act(actions);
            } else {
                self.report(host, ToServer::Silent(child, link));
            }
        }
    }
}

fn shown(place: &Place) -> String {
    let parent = place.parent.as_ref().map(|(node, link)| format!("{}/{link:?}", node.0));
    let children: Vec<_> = place.children.iter().map(|(node, link)| format!("{}/{link:?}", node.0)).collect();
    let family: Vec<_> = place.family.iter().map(|(node, depth)| (node.0, *depth)).collect();
    format!("{}: parent {parent:?} children {children:?} family {family:?}", place.epoch)
}

fn short(message: &ToServer) -> String {
    let link = |id: &LinkId| format!("{:02x}{:02x}{:02x}{:02x}", id[0], id[1], id[2], id[3]);
    match message {
        ToServer::Joined(id) => format!("joined {}", link(id)),
        ToServer::Lost(id) => format!("lost {}", link(id)),
        ToServer::Lacking(id, oldest) => format!("lacking {}, the oldest is {oldest}", link(id)),
        ToServer::Damaged(id, chunk) => format!("chunk {chunk} damaged {}", link(id)),
        ToServer::Silent(child, id) => format!("silent {} {}", child.0, link(id)),
        other => format!("{other:?}"),
    }
}
