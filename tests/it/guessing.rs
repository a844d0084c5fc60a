//! What does it cost the store when somebody guesses? A bounded number of questions, and others nothing at all.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::harness::backend::Backend;
use crate::harness::client::Client;
use crate::harness::gateway::{Gateway, PASSWORD, Store};
use crate::harness::redis::{REMEMBERS_ALL_COMMANDS, RedisServer};

const GUESSES: usize = 1_000;

/// A well-formed id that nobody has.
fn guess() -> String {
    format!("AA{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// Behind a trusted proxy, so that each request can come from where it likes.
fn gateway(backend: &Backend, redis: &RedisServer) -> Gateway {
    Gateway::in_front_of(&[backend])
        .route("/", "")
        .route("/public", "access = \"public\"")
        .store(Store::of(redis))
        .with("[server]\nthreads = 2\ntrusted_proxies = [\"127.0.0.1/32\"]")
        .start()
}

fn status(client: &Client, target: &str, from: &str) -> u16 {
    client.get(target).header("X-Forwarded-For", from).send().status
}

#[test]
fn a_network_that_guesses_is_stopped_and_nobody_else() {
    let (backend, redis) = (Backend::echo(), RedisServer::with(REMEMBERS_ALL_COMMANDS));
    let gateway = gateway(&backend, &redis);
    let (ann, guesser) = (gateway.log_in("ann"), gateway.client());
    let before = redis.look_ups();
    let (mut refused, mut stopped) = (0, None);
    for n in 0..GUESSES {
        guesser.set_cookie("session", &guess());
        // The /64 is one network, however many addresses it has.
        let response = guesser.get("/").header("X-Forwarded-For", &format!("2001:db8::{n:x}")).send();
        match response.status {
            401 => {}
            429 => {
                refused += 1;
                stopped = Some(response);
            }
            other => panic!("guess {n}: {other}"),
        }
    }
    assert!(GUESSES / 2 < refused, "{refused} of {GUESSES} were refused");
    assert!(redis.look_ups() - before < GUESSES / 2, "and cost the store nothing");
    let counted = |result: &str| gateway.metric(&format!("cloakroom_session_guesses_total{{result=\"{result}\"}}"));
    assert_eq!((counted("refused"), counted("unknown")), (refused as f64, (GUESSES - refused) as f64));

    let stopped = stopped.unwrap();
    assert!(stopped.header("retry-after").is_some());
    assert!(stopped.headers("set-cookie").is_empty(), "nobody looked: the cookie may be good");
    assert_eq!(status(&ann, "/", "192.0.2.1"), 200, "another network notices nothing");
    assert_eq!(status(&ann, "/", "2001:db8:0:1::1"), 200);
    assert_eq!(status(&guesser, "/public", "2001:db8::1"), 200, "nor do public routes");
    assert_eq!(status(&gateway.client(), "/", "2001:db8::1"), 401, "nor who brings no id");
    let neighbour = gateway.client();
    neighbour.set_cookie("session", &guess());
    assert_eq!(gateway.try_log_in(&neighbour, "bob", PASSWORD).status, 303, "and everybody can log in");
}

#[test]
fn the_same_unknown_id_is_a_question_now_and_then() {
    let (backend, redis) = (Backend::echo(), RedisServer::with(REMEMBERS_ALL_COMMANDS));
    let gateway = gateway(&backend, &redis);
    let stale = gateway.client();
    stale.set_cookie("session", &guess());
    let before = redis.look_ups();
    for _ in 0..100 {
        assert_eq!(status(&stale, "/", "192.0.2.1"), 401, "a page that asks on with a session that ended");
    }
    assert!(redis.look_ups() - before < 50);
}
