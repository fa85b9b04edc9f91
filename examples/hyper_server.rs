//! An HTTP server: hyper, unchanged, on streams that move their bytes through memory where the client can do so. Any
//! client can ask; one under libsmc.so (`smc run -- curl …`, `smc run -- wrk …`) is upgraded.
//!
//! Usage: `hyper_server [ADDR]` (default 127.0.0.1:0). The first line of output is the address. `GET` is answered with the
//! way by which the bytes of the connection go; what else has a body gets it back.

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use smc::net::tokio::{Listener, Stream};
use std::io;

async fn answer(
    request: Request<Incoming>,
    stream: &smc::net::Stream,
) -> hyper::Result<Response<Full<Bytes>>> {
    let body = if request.method() == Method::GET {
        let why = stream.reason().map_or(String::new(), |r| format!(" ({r})"));
        format!("{}{why}\n", stream.mode().name()).into()
    } else {
        request.into_body().collect().await?.to_bytes()
    };
    Ok(Response::new(Full::new(body)))
}

async fn serve(stream: Stream) -> Result<(), Box<dyn std::error::Error>> {
    stream.set_nodelay(true)?;
    // Another handle, to look at it while hyper has the stream.
    let look = std::sync::Arc::new(stream.as_ref().try_clone()?);
    let service = hyper::service::service_fn(move |request| {
        let look = look.clone();
        async move { answer(request, &look).await }
    });
    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await?;
    Ok(())
}

async fn listen(address: &str) -> io::Result<()> {
    let listener = Listener::bind(address).await?;
    println!("{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(e) = serve(stream).await {
                eprintln!("hyper_server: {e}");
            }
        });
    }
}

fn main() -> io::Result<()> {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:0".into());
    tokio::runtime::Builder::new_multi_thread().enable_io().build()?.block_on(listen(&address))
}
