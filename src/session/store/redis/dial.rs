//! How is one connection made? To a server or a sentinel, over TCP, TLS or a socket, greeted, logged in, answering.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ProtocolVersion, PushInfo, PushKind, RedisConnectionInfo, RedisResult, Value};
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::failure::{Failure, senseless};
use super::settings::{self, SettingsError};
use crate::config::model;
use crate::config::redis_url::{RedisAddress, RedisLogin, RedisPlace, RedisUrl};

/// Everything but the address.
pub(super) struct Dialer {
    tls: Option<TlsConnector>,
    server: RedisConnectionInfo,
    sentinel: RedisConnectionInfo,
    pub(super) connect_timeout: Duration,
    pub(super) response_timeout: Duration,
}

/// A connection that has answered, driven by the runtime that made it.
pub(super) struct Live {
    pub(super) connection: MultiplexedConnection,
    /// Somebody has seen that this connection is not to be used any more.
    pub(super) lost: Arc<Notify>,
    is_given_up: AtomicBool,
    driver: AbortHandle,
}

/// Who is expected at an address: they have logins of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Sentinel,
}

/// Room for that many requests between two turns of the driver; the client's default of 50 makes askers wait.
const REQUESTS_QUEUED_MAX: usize = 1000;

/// A peer that vanished is found by the heartbeat; this frees the socket where nobody listens for one.
const KEEPALIVE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_RETRIES: u32 = 3;
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(2);

impl Dialer {
    /// Reads the files that the settings name; connects to nothing and needs no runtime.
    pub(super) fn new(settings: &model::RedisStore, url: &RedisUrl) -> Result<Self, SettingsError> {
        let greeting = |login: &RedisLogin| {
            // RESP3 brings invalidations, and tells at once when a connection ends; CLIENT SETINFO would need a
            // permission of its own.
            let mut greeting =
                RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3).set_skip_set_lib_name();
            if let Some(user) = &login.user {
                greeting = greeting.set_username(user);
            }
            if let Some(password) = &login.password {
                greeting = greeting.set_password(password.expose());
            }
            greeting
        };
        let sentinel = match &url.place {
            RedisPlace::Sentinel { login, .. } => greeting(login),
            RedisPlace::Server(_) | RedisPlace::Cluster(_) => RedisConnectionInfo::default(),
        };
        Ok(Self {
            tls: settings::tls(settings, url)?.map(TlsConnector::from),
            server: greeting(&url.login).set_db(url.database.into()),
            sentinel,
            connect_timeout: settings.connect_timeout.get(),
            response_timeout: settings.response_timeout.get(),
        })
    }

    /// Within the connect timeout: a frozen server accepts connections, too. `on_push` is called by the connection's
    /// driver, in the order of the stream, before any reply that came later is handed out.
    pub(super) async fn dial(
        &self,
        address: &RedisAddress,
        role: Role,
        on_push: impl Fn(&PushInfo) + Send + Sync + 'static,
    ) -> Result<Live, Failure> {
        let attempt = async {
            let live = match address {
                RedisAddress::Socket(path) => {
                    let stream = UnixStream::connect(path).await.map_err(Failure::not_now)?;
                    self.greet(stream, role, on_push).await
                }
                RedisAddress::Tcp { host, port } => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(Failure::not_now)?;
                    prepare(&stream).map_err(Failure::not_now)?;
                    match &self.tls {
                        None => self.greet(stream, role, on_push).await,
                        Some(tls) => {
                            let name = ServerName::try_from(host.clone()).map_err(Failure::not_now)?;
                            let stream = tls.connect(name, stream).await.map_err(Failure::not_now)?;
                            self.greet(stream, role, on_push).await
                        }
                    }
                }
            };
            let live = live.map_err(|error| self.failure(role, &error))?;
            probe(live.connection.clone()).await.map_err(|error| self.failure(role, &error))?;
            Ok(live)
        };
        match timeout(self.connect_timeout, attempt).await {
            Ok(live) => live,
            Err(_elapsed) => Err(Failure::no_answer_within(self.connect_timeout)),
        }
    }

    async fn greet(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        role: Role,
        on_push: impl Fn(&PushInfo) + Send + Sync + 'static,
    ) -> RedisResult<Live> {
        let lost = Arc::new(Notify::new());
        let on_push = {
            let lost = Arc::clone(&lost);
            move |push: PushInfo| -> Result<(), redis::aio::SendError> {
                on_push(&push);
                if push.kind == PushKind::Disconnection {
                    lost.notify_one();
                }
                Ok(())
            }
        };
        // All waiting is ours, so that there is one place that says how long.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(REQUESTS_QUEUED_MAX)
            .set_push_sender(on_push);
        let greeting = self.greeting(role);
        let (connection, driver) = MultiplexedConnection::new_with_config(greeting, stream, config).await?;
        let ended = Arc::clone(&lost);
        let driver = tokio::spawn(async move {
            driver.await;
            ended.notify_one();
        });
        Ok(Live { connection, lost, is_given_up: AtomicBool::new(false), driver: driver.abort_handle() })
    }

    fn greeting(&self, role: Role) -> &RedisConnectionInfo {
        match role {
            Role::Server => &self.server,
            Role::Sentinel => &self.sentinel,
        }
    }

    fn failure(&self, role: Role, error: &redis::RedisError) -> Failure {
        let failure = Failure::of(error);
        match self.greeting(role).password() {
            // Servers that do not know a command send its arguments back.
            Some(password) if failure.cause.contains(password) => {
                Failure { cause: "the server refused to authenticate us".into(), ..failure }
            }
            Some(_) | None => failure,
        }
    }
}

impl Live {
    /// Nobody trusts it any more; whoever keeps it makes another one.
    pub(super) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
        self.lost.notify_one();
    }

    /// Nothing more will be answered, or nothing that is believed.
    pub(super) fn is_lost(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed) || self.driver.is_finished()
    }

    /// The replies to these commands, one each; the errors among them are the commands' own.
    pub(super) async fn ask(&self, commands: &redis::Pipeline, replies: usize) -> RedisResult<Vec<Value>> {
        let answer = self.connection.clone().send_packed_commands(commands, 0, replies).await?;
        if answer.len() == replies { Ok(answer) } else { Err(senseless()) }
    }

    /// As [`Self::ask`], for who has time of his own.
    pub(super) async fn ask_within<const N: usize>(
        &self,
        limit: Duration,
        commands: &redis::Pipeline,
    ) -> Result<[Value; N], Failure> {
        match timeout(limit, self.ask(commands, N)).await {
            Ok(Ok(replies)) => replies.try_into().map_err(|_| Failure::of(&senseless())),
            Ok(Err(error)) => Err(Failure::of(&error)),
            Err(_elapsed) => Err(Failure::no_answer_within(limit)),
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))
}

/// Whether the server answers and is ready. One that lacks the permission to ask is.
pub(super) async fn probe(mut connection: MultiplexedConnection) -> RedisResult<()> {
    match redis::cmd("PING").exec_async(&mut connection).await {
        Err(error) if error.code() == Some("NOPERM") => Ok(()),
        other => other,
    }
}
