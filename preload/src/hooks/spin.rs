//! How long polls and epoll waits look before they sleep: as the engine does it.

pub(super) use engine::wait::polling::Habit;
