//! The HTTP server of the install network, on a thread and a runtime of its own: the files that nodes load, from memory,
//! and their scripts. It answers GET and HEAD, and single ranges.

use super::events::{BootEvent, Events};
use super::files::BootFiles;
use super::listener::{Limited, Limits};
use super::nodes::{NodeStates, ScriptKind};
use super::query::Asker;
use super::range::{Wanted, wanted};
use super::script::{self, Site};
use crate::trust::Tickets;
use anyhow::{Context, Result, anyhow};
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::get;
use axum::serve::IncomingStream;
use std::net::{SocketAddr, SocketAddrV4, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long transfers may go on after the service was told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A listener that is bound but not yet served, so that its port is known before anything else starts.
pub struct Bound {
    listener: TcpListener,
    address: SocketAddrV4,
}

impl Bound {
    /// Binds `address`; port 0 takes any free one.
    ///
    /// # Errors
    /// When the address is not ours or the port is taken.
    pub fn new(address: SocketAddrV4) -> Result<Self> {
        let binding = || format!("binding the HTTP server to {address}");
        let listener = TcpListener::bind(address).with_context(binding)?;
        listener.set_nonblocking(true).with_context(binding)?;
        match listener.local_addr().with_context(binding)? {
            SocketAddr::V4(address) => Ok(Self { listener, address }),
            SocketAddr::V6(_) => Err(anyhow!("the kernel bound another address")).with_context(binding),
        }
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddrV4 {
        self.address
    }
}

/// What the server hands out.
pub struct Content {
    /// What is the same for all nodes.
    pub site: Site,
    /// The files.
    pub files: BootFiles,
    /// Who gets which script.
    pub states: Arc<NodeStates>,
    /// What nodes are given to be let in.
    pub tickets: Arc<dyn Tickets>,
    /// Where events go.
    pub events: Events,
}

/// A server that runs.
pub struct HttpServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    /// Starts to serve `content`.
    ///
    /// # Errors
    /// When the runtime or the thread cannot be started.
    pub fn start(bound: Bound, content: Content, limits: Limits) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime of the HTTP server")?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(bound.listener)
                .context("handing the HTTP listener to its runtime")?
        };
        let (stop, stopped) = oneshot::channel();
        let events = content.events.clone();
        let content = Arc::new(content);
        let thread = std::thread::Builder::new()
            .name("boot-http".to_owned())
            .spawn(move || {
                let ended = runtime.block_on(serve(Limited::new(listener, limits), content, stopped));
                if let Err(e) = ended {
                    let cause = format!("the HTTP server ended: {e}");
                    log::error!("{cause}");
                    events.send(BootEvent::HttpFailed { cause });
                }
                runtime.shutdown_background();
            })
            .context("starting the thread of the HTTP server")?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        // Dropping the sender is the signal.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the HTTP server ended badly");
        }
    }
}

async fn serve(
    listener: Limited,
    content: Arc<Content>,
    stopped: oneshot::Receiver<()>,
) -> std::io::Result<()> {
    let mut app = Router::new().route("/boot.ipxe", get(first_script)).route("/node.ipxe", get(node_script));
    for name in super::files::NAMES {
        let handler =
            move |State(content): State<Arc<Content>>,
                  ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
                  headers: HeaderMap| async move { file(&content, name, peer, &headers) };
        app = app.route(&format!("/{name}"), get(handler));
    }
    let app = app.with_state(content).into_make_service_with_connect_info::<Peer>();
    let (graceful, begin) = oneshot::channel::<()>();
    let signal = async move { drop(begin.await) };
    let server = tokio::spawn(std::future::IntoFuture::into_future(
        axum::serve(listener, app).with_graceful_shutdown(signal),
    ));
    // The other end sends nothing; it is dropped when the service is to stop.
    drop(stopped.await);
    drop(graceful);
    match tokio::time::timeout(STOP_LIMIT, server).await {
        Ok(Ok(ended)) => ended,
        Ok(Err(e)) => Err(std::io::Error::other(e)),
        // Transfers that are still going on are cut off.
        Err(_) => Ok(()),
    }
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
struct Peer(SocketAddr);

impl axum::extract::connect_info::Connected<IncomingStream<'_, Limited>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Limited>) -> Self {
        Self(*stream.remote_addr())
    }
}

fn file(content: &Content, name: &'static str, peer: SocketAddr, headers: &HeaderMap) -> Response {
    let Some(bytes) = content.files.get(name) else {
        return plain(StatusCode::NOT_FOUND, format!("no {name} here\n"));
    };
    let length = bytes.len() as u64;
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let part = wanted(range, length);
    log::debug!("HTTP: {} loads {name} {part:?}", peer.ip());
    let (status, body, content_range) = match part {
        Wanted::All => (StatusCode::OK, bytes, None),
        Wanted::Part(first, last) => {
            // Both lie within the length of a buffer, so they fit.
            let (from, to) = (usize::try_from(first).unwrap_or(0), usize::try_from(last).unwrap_or(0));
            let range = format!("bytes {first}-{last}/{length}");
            (StatusCode::PARTIAL_CONTENT, bytes.slice(from..=to), Some(range))
        }
        Wanted::Unsatisfiable => {
            (StatusCode::RANGE_NOT_SATISFIABLE, axum::body::Bytes::new(), Some(format!("bytes */{length}")))
        }
    };
    // Firmware that loads by ranges would flood the queue otherwise.
    if matches!(part, Wanted::All | Wanted::Part(0, _)) {
        content.events.send(BootEvent::Http { address: peer.ip(), file: name });
    }
    let size = body.len();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let Some(value) = content_range.and_then(|range| HeaderValue::from_str(&range).ok()) {
        headers.insert(header::CONTENT_RANGE, value);
    }
    response
}

async fn first_script(
    State(content): State<Arc<Content>>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
) -> Response {
    log::debug!("HTTP: {} loads the first script", peer.ip());
    plain(StatusCode::OK, script::first(&content.site))
}

async fn node_script(
    State(content): State<Arc<Content>>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    RawQuery(query): RawQuery,
) -> Response {
    let asker = match Asker::parse(query.as_deref().unwrap_or_default()) {
        Ok(asker) => asker,
        Err(e) => {
            log::warn!("HTTP: {} asks for a node's script, but {e}", peer.ip());
            return plain(StatusCode::BAD_REQUEST, format!("{e}\n"));
        }
    };
    if let Err(e) = content.states.refresh() {
        // What is known may be old, and an installed node must not be installed again: better no script at all.
        log::error!("{e:#}");
        return plain(StatusCode::SERVICE_UNAVAILABLE, "the node states cannot be read\n".to_owned());
    }
    let Asker { mac, platform, uuid, serial } = asker;
    let decision = content.states.decide(mac);
    let title = format!("{}: {}", decision.name.as_deref().unwrap_or("this machine"), decision.why);
    log::info!(
        "{mac} at {} ({platform:?}, uuid {}, serial {}) gets {:?}: {title}",
        peer.ip(),
        uuid.as_deref().unwrap_or("-"),
        serial.as_deref().unwrap_or("-"),
        decision.kind
    );
    let pass = match decision.kind {
        ScriptKind::Install => match content.tickets.pass(mac) {
            Ok(pass) => Some(pass),
            Err(e) => {
                log::error!("{mac} gets no token and cannot be installed: {e:#}");
                return plain(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "there is no token for this machine\n".to_owned(),
                );
            }
        },
        ScriptKind::LocalBoot | ScriptKind::Hold => None,
    };
    // The text holds a secret from here on: it goes to the node and into no log.
    let text = script::node(&content.site, decision.kind, pass.as_ref(), platform, mac, &title);
    let name = decision.name;
    content.events.send(match decision.kind {
        ScriptKind::LocalBoot => BootEvent::LocalBoot { mac, name, platform },
        kind => BootEvent::Script { mac, name, kind, platform },
    });
    plain(StatusCode::OK, text)
}

fn plain(status: StatusCode, text: String) -> Response {
    let size = text.len();
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    // A proxy between us must not hand a node its script of yesterday.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
