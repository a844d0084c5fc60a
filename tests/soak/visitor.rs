//! Who comes, and what must they see? One person with one session, who does one thing after the other.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::backend::answer;
use crate::harness::client::{Client, Connection, Response};
use crate::harness::gateway::{Form, PASSWORD};
use crate::pause;
use crate::tally::Tally;
use crate::world::Visits;

/// How long after the answer to a logout another gateway may still serve the session: `store.redis.lease`, and as much again
/// for a machine that has much to do.
const LOGOUT_BOUND: Duration = Duration::from_secs(2);

/// Between two looks at a gateway that is not back yet.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

const UPLOAD_BYTES_MAX: usize = 512 << 10;

pub(crate) struct Visitor<'w> {
    user: String,
    visits: &'w Visits,
    tally: &'w Tally,
    dice: StdRng,
    /// The gateway that is asked first; when it does not answer, the other one is.
    at: usize,
    clients: Vec<Client>,
    session: Option<Live>,
}

/// A session that the visitor has not ended.
struct Live {
    cookie: String,
    since: Instant,
}

pub(crate) fn dice(seed: u64, number: u64) -> StdRng {
    StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

impl<'w> Visitor<'w> {
    pub(crate) fn new(number: u64, seed: u64, visits: &'w Visits, tally: &'w Tally) -> Self {
        let clients = visits.gateways.iter().map(|address| Client::of(*address)).collect();
        let at = number as usize % visits.gateways.len();
        Self { user: format!("visitor-{number}"), visits, tally, dice: dice(seed, number), at, clients, session: None }
    }

    pub(crate) fn do_something(&mut self) {
        pause(Duration::from_millis(self.dice.random_range(0..60)));
        if self.session.is_none() {
            return self.log_in();
        }
        match self.dice.random_range(0..100) {
            0..60 => self.look_at_page(),
            60..70 => self.look_at_public_page(),
            70..88 => self.upload(),
            88..98 => self.talk(),
            _ => self.log_out(),
        }
    }

    /// At the end, when all is up again: the session is known at every gateway. A gateway whose connections to the store
    /// are not back may say so until `deadline`.
    pub(crate) fn look_around(&mut self, deadline: Instant) {
        for at in 0..self.clients.len() {
            if self.session.is_none() {
                return;
            }
            let (began, response) = loop {
                let began = Instant::now();
                let answer = self.clients[at].get("/private/page").try_send();
                let problem = match answer {
                    Ok(response) if !is_for_the_moment(response.status) => break (began, response),
                    Ok(response) => format!("{} {}", response.status, reason(&response)),
                    Err(error) => error.to_string(),
                };
                if deadline < Instant::now() {
                    let user = &self.user;
                    return self.tally.wrong(&format!("gateway {at} does not serve {user} in the end: {problem}"));
                }
                pause(LOOK_AGAIN);
            };
            self.expect("look around", began, &response, &answer(&self.user, b""));
        }
    }

    fn log_in(&mut self) {
        let began = Instant::now();
        let client = Client::of(self.visits.gateways[self.at]);
        let Ok(page) = client.navigate("/.cloakroom/login").try_send() else { return self.gone("login") };
        if page.status != 200 {
            return self.refused("login", &page);
        }
        let form = Form::on(&page.text()).filled_in(&[("username", &self.user), ("password", PASSWORD)]);
        let Ok(response) = client.post_form("/.cloakroom/login", &borrowed(&form)).try_send() else {
            return self.gone("login");
        };
        let Some(cookie) = client.cookie("session").filter(|_| response.status == 303) else {
            return self.refused("login", &response);
        };
        self.tally.answered("login", began.elapsed());
        self.clients.iter().for_each(|client| client.set_cookie("session", &cookie));
        self.session = Some(Live { cookie, since: Instant::now() });
    }

    fn log_out(&mut self) {
        let began = Instant::now();
        let client = &self.clients[self.at];
        let Ok(page) = client.navigate("/.cloakroom/logout").try_send() else { return self.gone("logout") };
        if page.status != 200 || !page.text().contains("<form") {
            return self.refused("logout", &page);
        }
        let form = Form::on(&page.text()).fields;
        let Ok(response) = client.post_form("/.cloakroom/logout", &borrowed(&form)).try_send() else {
            // Nobody knows whether it has been heard: this session may be over.
            self.forget();
            return self.gone("logout");
        };
        if response.status != 303 {
            // "We could not log you out": the session may live, or not.
            self.forget();
            return self.refused("logout", &response);
        }
        self.tally.answered("logout", began.elapsed());
        let ended = Instant::now();
        let Some(Live { cookie, .. }) = self.forget() else { return };
        pause(LOGOUT_BOUND);
        for address in self.visits.gateways.clone() {
            let thief = Client::of(address);
            thief.set_cookie("session", &cookie);
            match thief.get("/private/after").try_send() {
                Ok(response) if response.status == 200 && self.visits.may_be_forgotten(ended) => {
                    self.tally.logout_lost_by_redis();
                }
                Ok(response) if response.status == 200 => {
                    self.tally.wrong(&format!("{} is served after the logout, by {address}", self.user));
                }
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn look_at_page(&mut self) {
        let began = Instant::now();
        let Some(response) = self.ask("page", "GET", "/private/page", None) else { return };
        self.expect("page", began, &response, &answer(&self.user, b""));
    }

    fn look_at_public_page(&mut self) {
        let began = Instant::now();
        let Some(response) = self.ask("public page", "GET", "/public", None) else { return };
        self.expect("public page", began, &response, &answer("", b""));
    }

    fn upload(&mut self) {
        let mut body = vec![0; self.dice.random_range(1..UPLOAD_BYTES_MAX)];
        self.dice.fill(&mut body[..]);
        let began = Instant::now();
        let expected = answer(&self.user, &body);
        let Some(response) = self.ask("upload", "POST", "/private/upload", Some(body)) else { return };
        self.expect("upload", began, &response, &expected);
    }

    /// Says something on a socket, a few times, and hears it again.
    fn talk(&mut self) {
        let began = Instant::now();
        let mut socket = match self.open_socket() {
            Ok(socket) => socket,
            Err(Some(response)) => return self.refused("socket", &response),
            Err(None) => return self.gone("socket"),
        };
        for _ in 0..self.dice.random_range(1..20) {
            let mut said = vec![0; self.dice.random_range(1..100)];
            self.dice.fill(&mut said[..]);
            // A frame of bytes, masked with zeros (RFC 6455, section 5.2), which the backend sends back as it is.
            let frame = [&[0x82, 0x80 | said.len() as u8, 0, 0, 0, 0][..], &said].concat();
            let heard = socket.try_write(&frame).and_then(|()| socket.read_exactly(frame.len() as u64));
            match heard {
                Ok(heard) if heard == frame => {}
                // A close frame, which a gateway or a backend says at its end, is no echo.
                Ok(heard) if heard[0] == 0x88 => return self.tally.failed("socket", "closed"),
                Ok(_) => return self.tally.wrong(&format!("{} heard what nobody said", self.user)),
                Err(_) => return self.tally.failed("socket", "broke off"),
            }
            pause(Duration::from_millis(self.dice.random_range(0..100)));
        }
        self.tally.answered("socket", began.elapsed());
    }

    /// # Errors
    /// The response that is not 101, if there is one.
    fn open_socket(&self) -> Result<Connection, Option<Response>> {
        self.clients[self.at]
            .try_web_socket("/private/socket", &[])
            .map_err(|problem| problem.map(|response| *response))
    }

    /// The response, from whichever gateway gives one. As a balancer does, only what may be repeated is.
    fn ask(&mut self, kind: &'static str, method: &str, target: &str, body: Option<Vec<u8>>) -> Option<Response> {
        for attempt in 0..2 {
            let mut request = self.clients[self.at].request(method, target);
            if let Some(body) = &body {
                request = request.body(body.clone());
            }
            match request.try_send() {
                Ok(response) => return Some(response),
                Err(_) => {
                    self.at = (self.at + 1) % self.clients.len();
                    if body.is_some() || attempt == 1 {
                        self.tally.failed(kind, "no answer: the gateway was killed");
                        return None;
                    }
                    self.tally.failed(kind, "no answer: the gateway was killed, and the other one was asked");
                }
            }
        }
        None
    }

    fn expect(&mut self, kind: &'static str, began: Instant, response: &Response, expected: &str) {
        if response.status != 200 {
            return self.refused(kind, response);
        }
        if response.text() == expected {
            self.tally.answered(kind, began.elapsed());
        } else {
            self.tally.wrong(&format!("{kind}: {} got {:?}, not {expected:?}", self.user, response.text()));
        }
    }

    fn refused(&mut self, kind: &'static str, response: &Response) {
        match response.status {
            401 | 302 => self.is_out(kind),
            status if is_for_the_moment(status) => {
                self.tally.failed(kind, &format!("{} {}", response.status, reason(response)))
            }
            // The session was there when the form was made, and the store is away when it is sent.
            200 | 303 if kind == "login" || kind == "logout" => self.tally.failed(kind, "answered with another page"),
            status => self.tally.wrong(&format!("{kind}: {status}: {}", response.text())),
        }
    }

    /// Told to log in: did Redis lose the session, or did we?
    fn is_out(&mut self, kind: &'static str) {
        let Some(Live { cookie, since }) = self.forget() else { return self.tally.failed(kind, "not logged in") };
        let redis_has = self.visits.redis_has(&cookie);
        if !redis_has && self.visits.may_be_forgotten(since) {
            return self.tally.lost_by_redis();
        }
        let age = since.elapsed();
        self.tally.wrong(&format!("{}: a session of {age:?} is lost; Redis has it: {redis_has}", self.user));
    }

    fn forget(&mut self) -> Option<Live> {
        self.clients = self.visits.gateways.iter().map(|address| Client::of(*address)).collect();
        self.session.take()
    }

    fn gone(&mut self, kind: &'static str) {
        self.at = (self.at + 1) % self.clients.len();
        self.tally.failed(kind, "no answer: the gateway was killed");
    }
}

/// Refused, and no fault of the one who asked.
fn is_for_the_moment(status: u16) -> bool {
    matches!(status, 429 | 502..=504)
}

/// What an answer says of itself: the `error` of a JSON reply, or the title of a page.
fn reason(response: &Response) -> String {
    let text = response.text();
    let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
    if let Some(error) = json.as_ref().and_then(|json| json["error"].as_str()) {
        return error.to_owned();
    }
    let title = text.split_once("<title>").and_then(|(_, rest)| rest.split_once("</title>"));
    title.map_or_else(String::new, |(title, _)| title.to_owned())
}

fn borrowed(fields: &[(String, String)]) -> Vec<(&str, &str)> {
    fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}
