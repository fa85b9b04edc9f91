//! The hooks, by what they are about.

pub mod aio;
pub mod data;
pub mod direct;
pub mod epoll;
pub mod execl;
pub mod fdops;
pub mod liburing;
pub mod making;
pub mod print;
pub mod process;
pub mod ready;
mod relay;
pub mod signals;
pub mod sleep;
pub mod sockets;
mod spin;
pub mod unseen;
pub mod uring;
mod variadic;
