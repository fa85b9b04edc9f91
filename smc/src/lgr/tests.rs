//! Tests of link groups and their registry, without a handshake.

use super::*;
use crate::mem::region::Region;

fn joined(asked: Asked) -> Member {
    match asked {
        Asked::Group(m) => m,
        Asked::Busy => panic!("nobody else is here"),
    }
}

/// A pid per test, since all tests share the process's registry.
fn peer(pid: i32) -> Member {
    joined(owned(pid, 7, 42))
}

fn is_registered(pid: i32) -> bool {
    let mut found = false;
    each(|g| found |= g.key().pid == pid);
    found
}

#[test]
fn one_group_for_a_peer_until_the_last_leaves() {
    let a = peer(-1);
    let b = peer(-1);
    assert!(Arc::ptr_eq(a.group(), b.group()));
    assert!(!Arc::ptr_eq(a.group(), joined(owned(-1, 8, 42)).group()), "another user");
    assert!(!Arc::ptr_eq(a.group(), joined(owned(-1, 7, 43)).group()), "another image");
    let number = a.group().number();
    drop(a);
    assert!(is_registered(-1));
    drop(b);
    assert!(!is_registered(-1));
    assert_ne!(peer(-1).group().number(), number, "no idle cache");
}

#[test]
fn terminated_groups_serve_their_members_and_no_others() {
    let a = peer(-2);
    let grant = a.group().rmb().unwrap().allocate(1 << 14, 0, u64::MAX, 100).unwrap();
    a.group().terminate();
    a.group().terminate();
    assert!(a.group().is_terminated() && !is_registered(-2));
    grant.buffers.page().side[0].tx.prod.store(1, crate::sync::Ordering::Relaxed);
    let b = peer(-2);
    assert!(!Arc::ptr_eq(a.group(), b.group()));
    drop(a);
    assert!(is_registered(-2), "only its own entry was taken away");
}

#[test]
fn mappings_go_with_the_last_reference() {
    let a = peer(-3);
    let group = a.group().clone();
    let weak = Arc::downgrade(&group);
    drop(a);
    assert!(!is_registered(-3));
    assert!(weak.upgrade().is_some(), "an Arc holds it");
    drop(group);
    assert!(weak.upgrade().is_none());
}

#[test]
fn a_reservation_keeps_others_from_building_the_same() {
    let key = LgrKey { pid: -4, uid: 7, instance: 1, owner: Owner::Local, number: 0 };
    let r = registry::current().reserve(key).unwrap();
    assert!(matches!(owned(-4, 7, 1), Asked::Busy));
    assert!(matches!(registry::current().reserve(key), Err(Found::Reserved)));
    drop(r);
    assert!(matches!(owned(-4, 7, 1), Asked::Group(_)));
}

#[test]
fn a_failed_first_contact_leaves_nothing() {
    let key = LgrKey { pid: -5, uid: 7, instance: 1, owner: Owner::Remote, number: 3 };
    assert_eq!(mapped(key, || Err("refused")).err(), Some("refused"));
    assert!(!is_registered(-5));
    let first =
        || Region::create(1 << 20, u64::MAX).map(|(region, _)| Arc::new(Segment { number: 2, region }));
    let m = joined(mapped(key, first).unwrap());
    assert_eq!(m.group().mapped_mask(), Some(4));
    assert_eq!(any_mapped(-5, 7).unwrap().group().number(), 3);
    assert!(any_mapped(-5, 8).is_none());
}

#[test]
fn many_threads_join_and_leave() {
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                for i in 0..300 {
                    if let Asked::Group(m) = owned(-100 - i % 3, 7, 1) {
                        assert_eq!(m.group().key().pid, -100 - i % 3);
                        if i % 7 == 0 {
                            m.group().terminate();
                        }
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!((-102..=-100).all(|pid| !is_registered(pid)));
}

#[test]
fn processes_that_the_kernel_does_not_name_share_nothing() {
    let a = joined(owned(0, 7, 42));
    let b = joined(owned(0, 7, 42));
    assert!(!Arc::ptr_eq(a.group(), b.group()), "the instance is the peer's word alone");
    let (region, _fd) = Region::create(1 << 20, u64::MAX).unwrap();
    let segment = Arc::new(Segment { number: 0, region });
    let key = LgrKey { pid: 0, uid: 7, instance: vouched(0, 42), owner: Owner::Remote, number: 1 };
    let c = joined(mapped(key, || Ok::<_, ()>(segment.clone())).unwrap());
    assert!(any_mapped(0, 7).is_none(), "proposed to nobody");
    let again = LgrKey { instance: vouched(0, 42), ..key };
    let d = joined(mapped(again, || Ok::<_, ()>(segment)).unwrap());
    assert!(!Arc::ptr_eq(c.group(), d.group()));
}
