//! Data connections between parents and children: dialled, answered, carrying chunks down and acknowledgements up, and
//! ended in all the ways in which a connection ends.

use super::control::ToServer;
use super::world::World;
use crate::core::Acknowledgement;
use crate::core::relay::Answer;
use crate::link::LinkId;
use std::collections::VecDeque;

/// ms that a handshake may take.
pub(super) const HANDSHAKE: u64 = 5_000;

/// How a parent sees a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The dial is under way, or its link is not known yet.
    Dialled,
    Welcomed,
    Lacking,
}

/// A data connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) link: LinkId,
    pub(super) parent: usize,
    pub(super) child: usize,
    opened: u64,
    want: u64,
    /// When the dial reaches the parent.
    reaches: u64,
    stage: Stage,
    answer: Option<(u64, Answer)>,
    /// The child has been welcomed.
    pub(super) joined: bool,
    down: VecDeque<(u64, u64)>,
    up: VecDeque<(u64, Acknowledgement)>,
    /// When each end was closed.
    parent_closed: Option<u64>,
    child_closed: Option<u64>,
    pub(super) cut_down: bool,
    pub(super) cut_up: bool,
}

impl World {
    fn lag(&mut self) -> u64 {
        self.chance.within(0, 4)
    }

    fn goes_down(&self, conn: usize, at: u64) -> bool {
        let c = &self.conns[conn];
        !c.cut_down && !self.one_way.contains(&(c.parent, c.child)) && self.arrived(c.parent, c.child, at)
    }

    fn goes_up(&self, conn: usize, at: u64) -> bool {
        let c = &self.conns[conn];
        !c.cut_up && !self.one_way.contains(&(c.child, c.parent)) && self.arrived(c.child, c.parent, at)
    }

    /// The connection that stands between a node and the parent that it obeys.
    pub(super) fn conn_to_parent(&self, node: usize) -> Option<usize> {
        let (_, link) = self.hosts[node].relay.parent()?;
        let fits = |conn: &&usize| self.conns[**conn].child == node && self.conns[**conn].link == link.id;
        self.hosts[node].conns.iter().find(fits).copied()
    }

    pub(super) fn dial(&mut self, child: usize, parent: usize, link: LinkId) {
        let reaches = self.now + 1 + self.lag();
        let want = self.hosts[child].relay.end();
        self.conns.push(Conn {
            link,
            parent,
            child,
            opened: self.now,
            want,
            reaches,
            stage: Stage::Dialled,
            answer: None,
            joined: false,
            down: VecDeque::new(),
            up: VecDeque::new(),
            parent_closed: None,
            child_closed: None,
            cut_down: false,
            cut_up: false,
        });
        let conn = self.conns.len() - 1;
        self.hosts[child].conns.push(conn);
        self.hosts[parent].conns.push(conn);
        self.wake(parent, reaches);
        self.wake(child, self.now + HANDSHAKE);
    }

    fn close_end(&mut self, conn: usize, by_parent: bool) {
        let lag = self.now + self.lag();
        let c = &mut self.conns[conn];
        let (end, host, other) = if by_parent {
            (&mut c.parent_closed, c.parent, c.child)
        } else {
            (&mut c.child_closed, c.child, c.parent)
        };
        end.get_or_insert(lag);
        self.hosts[host].conns.retain(|open| *open != conn);
        self.wake(other, lag);
    }

    /// Closes what stands under this name; the relay has asked for it.
    pub(super) fn close_link(&mut self, host: usize, link: &LinkId, as_parent: bool) {
        for conn in self.hosts[host].conns.clone() {
            let c = &self.conns[conn];
            if c.link == *link && as_parent == (c.parent == host) {
                self.close_end(conn, as_parent);
            }
        }
    }

    /// All connections of a machine end; abruptly means that some of what was under way is lost.
    pub(super) fn close_all(&mut self, host: usize, abruptly: bool) {
        for conn in self.hosts[host].conns.clone() {
            if abruptly && self.chance.percent(50) {
                self.conns[conn].down.clear();
            }
            let by_parent = self.conns[conn].parent == host;
            self.close_end(conn, by_parent);
        }
    }

    /// Both ends find the connection closed.
    pub(super) fn reset(&mut self, conn: usize) {
        self.conns[conn].down.clear();
        let (now, c) = (self.now, &mut self.conns[conn]);
        c.parent_closed.get_or_insert(now);
        c.child_closed.get_or_insert(now);
        let (parent, child) = (c.parent, c.child);
        self.wake(parent, now);
        self.wake(child, now);
    }

    /// A parent's work: dials, acknowledgements, ends.
    pub(super) fn serve_children(&mut self, host: usize) {
        let mut at = 0;
        while let Some(conn) = self.hosts[host].conns.get(at).copied() {
            at += 1;
            if self.conns[conn].parent == host && !self.serve_child(host, conn) {
                at -= 1;
            }
        }
    }

    /// Whether the connection goes on.
    fn serve_child(&mut self, host: usize, conn: usize) -> bool {
        let (now, link) = (self.hosts[host].time, self.conns[conn].link);
        if self.conns[conn].stage == Stage::Dialled {
            let reaches = self.conns[conn].reaches;
            if !self.goes_up(conn, reaches) {
                return true;
            }
            let (_, answer) = self.hosts[host].relay.hello(&link, self.conns[conn].want, now);
            self.conns[conn].stage = match answer {
                Answer::Welcome => Stage::Welcomed,
                Answer::Lacking(_) => Stage::Lacking,
                Answer::Unknown if self.now >= reaches + HANDSHAKE => {
                    self.close_end(conn, true);
                    return false;
                }
                Answer::Unknown => return true,
            };
            let (arrives, child) = (self.now + 1 + self.lag(), self.conns[conn].child);
            self.conns[conn].answer = Some((arrives, answer));
            self.wake(child, arrives);
        }
        while let Some((at, _)) = self.conns[conn].up.front()
            && self.goes_up(conn, *at)
            && let Some((_, said)) = self.conns[conn].up.pop_front()
        {
            self.hosts[host].relay.acknowledged(&link, &said, now);
        }
        let reset = self.conns[conn].parent_closed.is_some();
        if reset || self.conns[conn].child_closed.is_some_and(|at| self.goes_up(conn, at)) {
            self.hosts[host].relay.child_closed(&link);
            self.close_end(conn, true);
            return false;
        }
        true
    }

    /// A child's work: the answer, chunks, the end.
    pub(super) fn read_parent(&mut self, host: usize) {
        let mut at = 0;
        while let Some(conn) = self.hosts[host].conns.get(at).copied() {
            at += 1;
            if self.conns[conn].child == host && !self.read_conn(host, conn) {
                at -= 1;
            }
        }
    }

    fn read_conn(&mut self, host: usize, conn: usize) -> bool {
        let link = self.conns[conn].link;
        if let Some((at, answer)) = self.conns[conn].answer
            && self.goes_down(conn, at)
        {
            self.conns[conn].answer = None;
            self.conns[conn].opened = u64::MAX / 2;
            if let Answer::Lacking(oldest) = answer {
                self.report(host, ToServer::Lacking(link, oldest));
            } else {
                self.conns[conn].joined = true;
                self.report(host, ToServer::Joined(link));
                self.acknowledge_again(host);
            }
        }
        while self.conns[conn].joined
            && let Some((at, number)) = self.conns[conn].down.front().copied()
            && self.goes_down(conn, at)
            && self.hosts[host].relay.room()
        {
            self.conns[conn].down.pop_front();
            let end = self.hosts[host].relay.end();
            if number != end {
                let parent = self.conns[conn].parent;
                let text = format!("node {host} wants chunk {end} and is given {number} by host {parent}");
                self.oracle.fail(self.now, text);
                return true;
            }
            if self.is_damaged(conn) {
                self.note(|| format!("node {host} is given a bad copy of chunk {number}"));
                self.close_end(conn, false);
                if self.hosts[host].relay.parent().is_some_and(|(_, current)| current.id == link) {
                    self.report(host, ToServer::Damaged(link, number));
                }
                return false;
            }
            self.hosts[host].relay.pushed(self.sizes[number as usize], number + 1 == self.plan.total);
            let parent = self.conns[conn].parent;
            let at = self.now + self.lag();
            self.wake(parent, at);
            self.acknowledge(host);
            self.consume(host);
        }
        let c = &self.conns[conn];
        let reset = c.child_closed.is_some();
        let empty = c.down.is_empty();
        let ended = reset || c.parent_closed.is_some_and(|at| empty && self.goes_down(conn, at));
        let late = !c.joined && c.opened.saturating_add(HANDSHAKE) <= self.now;
        if ended || late {
            self.close_end(conn, false);
            if self.hosts[host].relay.parent().is_some_and(|(_, current)| current.id == link) {
                self.report(host, ToServer::Lost(link));
            }
            return false;
        }
        true
    }

    /// Whether the copy that this connection brings is bad.
    fn is_damaged(&mut self, conn: usize) -> bool {
        let Conn { parent, child, .. } = self.conns[conn];
        if self.garbles.contains(&child) {
            return true;
        }
        if let Some(at) = self.damages.iter().position(|(host, always)| *host == parent && !always) {
            self.damages.swap_remove(at);
            return true;
        }
        self.damages.iter().any(|(host, _)| *host == parent)
    }

    /// What can be sent is sent, as far as the buffers take it.
    pub(super) fn send_children(&mut self, host: usize) {
        let now = self.hosts[host].time;
        for at in 0..self.hosts[host].conns.len() {
            let conn = self.hosts[host].conns[at];
            let c = &self.conns[conn];
            if c.parent != host || c.stage != Stage::Welcomed {
                continue;
            }
            let Some(child) = self.hosts[host].relay.child_of(&c.link) else { continue };
            while self.conns[conn].down.len() < self.plan.buffer
                && let Some(number) = self.hosts[host].relay.next_for(child)
            {
                if number < self.hosts[host].relay.first() {
                    self.oracle
                        .fail(self.now, format!("host {host} is to send chunk {number}, which has left"));
                    return;
                }
                self.hosts[host].relay.sent(child, number, now);
                let free = self.conns[conn].down.back().map_or(self.now, |(at, _)| self.now.max(*at));
                let arrives = free + self.plan.wire + self.lag();
                self.conns[conn].down.push_back((arrives, number));
                let to = self.conns[conn].child;
                self.wake(to, arrives);
            }
        }
    }

    /// Says to the parent what is due.
    pub(super) fn acknowledge(&mut self, host: usize) {
        let Some(conn) = self.conn_to_parent(host).filter(|conn| self.conns[*conn].joined) else { return };
        let now = self.hosts[host].time;
        if let Some(said) = self.hosts[host].relay.acknowledge(now) {
            self.send_up(conn, said);
        }
    }

    /// Says everything to the parent, whatever was said before.
    pub(super) fn acknowledge_again(&mut self, host: usize) {
        let Some(conn) = self.conn_to_parent(host).filter(|conn| self.conns[*conn].joined) else { return };
        let now = self.hosts[host].time;
        let said = self.hosts[host].relay.acknowledge_again(now);
        self.send_up(conn, said);
    }

    fn send_up(&mut self, conn: usize, said: Acknowledgement) {
        let at = self.now + 1 + self.lag();
        let at = self.conns[conn].up.back().map_or(at, |(last, _)| at.max(*last));
        self.conns[conn].up.push_back((at, said));
        let parent = self.conns[conn].parent;
        self.wake(parent, at);
    }
}
