//! Streams under tokio, and hyper on them. Nothing has a time-out: a lost wake-up hangs.

use crate::{check, eager, pattern};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use smc::net::Mode;
use smc::net::tokio::{Listener, Stream};
use std::convert::Infallible;
use std::future::Future;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// In a runtime of one thread, and in one of several.
fn both<F: Future<Output = ()>>(f: impl Fn() -> F) {
    crate::watchdog();
    let one = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    one.block_on(f());
    let several = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    several.block_on(f());
}

async fn pair() -> (Stream, Stream) {
    let listener = Listener::new(eager().listen("127.0.0.1:0").unwrap()).unwrap();
    let client = Stream::connect_with(&eager(), listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

fn in_ring(s: &Stream) -> bool {
    s.status().is_some_and(|s| s.mode_tx == Mode::Shm && s.mode_rx == Mode::Shm)
}

async fn pingpong(a: &mut Stream, b: &mut Stream, times: usize) {
    for n in 0..times {
        let (out, mut got) = ([n as u8; 8], [0; 8]);
        a.write_all(&out).await.unwrap();
        b.read_exact(&mut got).await.unwrap();
        assert_eq!(got, out);
        b.write_all(&got).await.unwrap();
        a.read_exact(&mut got).await.unwrap();
        assert_eq!(got, out);
    }
}

#[test]
fn tasks_that_answer_each_other() {
    both(|| async {
        let (mut a, mut b) = pair().await;
        let echo = tokio::spawn(async move {
            let mut buf = vec![0; 4096];
            loop {
                match b.read(&mut buf).await.unwrap() {
                    0 => return b,
                    n => b.write_all(&buf[..n]).await.unwrap(),
                }
            }
        });
        for n in 0..5000usize {
            let (out, mut back) = (pattern(n, 1 + n % 3000), vec![0; 1 + n % 3000]);
            a.write_all(&out).await.unwrap();
            a.read_exact(&mut back).await.unwrap();
            assert!(out == back, "message {n}");
        }
        assert!(in_ring(&a), "{:?}", a.status());
        a.shutdown().await.unwrap();
        drop(echo.await.unwrap());
        assert_eq!(a.read(&mut [0]).await.unwrap(), 0);
    });
}

#[test]
fn bulk_both_ways_by_one_reading_and_one_writing_task() {
    const ALL: usize = 4 << 20;
    async fn through(s: Stream) -> Stream {
        let (mut r, mut w) = tokio::io::split(s);
        let send = tokio::spawn(async move {
            for at in (0..ALL).step_by(9000) {
                w.write_all(&pattern(at, 9000.min(ALL - at))).await.unwrap();
            }
            w
        });
        let mut all = vec![0; ALL];
        r.read_exact(&mut all).await.unwrap();
        check(0, &all);
        r.unsplit(send.await.unwrap())
    }
    both(|| async {
        let (mut a, mut b) = pair().await;
        pingpong(&mut a, &mut b, 200).await;
        let other = tokio::spawn(through(b));
        let (a, b) = (through(a).await, other.await.unwrap());
        for s in [&a, &b] {
            assert!(s.status().unwrap().rx_bytes_ring > ALL as u64 / 2, "{:?}", s.status());
        }
    });
}

#[test]
fn the_peer_goes_back_to_tcp_in_mid_stream() {
    const ALL: usize = 2 << 20;
    both(|| async {
        let (mut a, mut b) = pair().await;
        pingpong(&mut a, &mut b, 200).await;
        assert!(in_ring(&a) && in_ring(&b));
        let (mut r, mut w) = tokio::io::split(a);
        let writer = tokio::spawn(async move {
            w.write_all(&pattern(0, ALL)).await.unwrap();
            w.flush().await.unwrap();
        });
        let reader = tokio::spawn(async move {
            let mut answer = [0; 4];
            r.read_exact(&mut answer).await.unwrap();
            answer
        });
        let mut first = vec![0; 100_000];
        b.read_exact(&mut first).await.unwrap();
        let (tcp, unread) = b.into_tcp().unwrap();
        let mut tcp = tokio::net::TcpStream::from_std(tcp).unwrap();
        first.extend(unread);
        let at = first.len();
        first.resize(ALL, 0);
        tcp.read_exact(&mut first[at..]).await.unwrap();
        check(0, &first);
        tcp.write_all(b"done").await.unwrap();
        writer.await.unwrap();
        assert_eq!(&reader.await.unwrap(), b"done");
    });
}

#[test]
fn a_task_that_always_finds_something_lets_others_run() {
    let one = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    one.block_on(async {
        let (mut a, mut b) = pair().await;
        pingpong(&mut a, &mut b, 200).await;
        // Both ends in one task: neither ever has to wait.
        let busy = tokio::spawn(async move {
            loop {
                a.write_all(b"x").await.unwrap();
                b.read_exact(&mut [0]).await.unwrap();
            }
        });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        busy.abort();
    });
}

#[test]
fn a_blocking_stream_becomes_one_for_tasks_and_back() {
    both(|| async {
        let (a, b) = crate::upgraded();
        let (mut a, mut b) = (Stream::new(a).unwrap(), Stream::new(b).unwrap());
        pingpong(&mut a, &mut b, 100).await;
        let (a, b) = (a.into_blocking(), b.into_blocking());
        a.set_nonblocking(false).unwrap();
        use std::io::{Read as _, Write as _};
        (&b).write_all(b"!").unwrap();
        (&a).read_exact(&mut [0]).unwrap();
    });
}

// ---- hyper, which knows nothing of libsmc

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut out = path.into_bytes();
    out.extend_from_slice(&body);
    Ok(Response::new(Full::new(out.into())))
}

#[test]
fn hyper_serves_and_asks_on_streams_of_ours() {
    both(|| async {
        let listener = Listener::new(eager().listen("127.0.0.1:0").unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(answer);
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await
        });
        let stream = Stream::connect_with(&eager(), address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.unwrap();
        let client = tokio::spawn(connection.without_shutdown());
        for n in 0..300usize {
            let body = pattern(n, if n % 50 == 49 { 300_000 } else { n });
            let request =
                Request::post(format!("/{n}")).header("host", "x").body(Full::new(body.clone().into()));
            sender.ready().await.unwrap();
            let response = sender.send_request(request.unwrap()).await.unwrap();
            let got = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(got[..got.len() - body.len()], *format!("/{n}").as_bytes());
            assert!(got[got.len() - body.len()..] == body, "request {n}");
        }
        drop(sender);
        let stream = client.await.unwrap().unwrap().io.into_inner();
        assert!(in_ring(&stream), "{:?}", stream.status());
        drop(stream);
        server.await.unwrap().unwrap();
    });
}
