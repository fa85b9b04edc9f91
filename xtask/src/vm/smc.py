"""smc.py EID DEVICE=PNETID...: tells the kernel's SMC which RDMA device goes with which Ethernet device, and its EID.

By generic netlink (linux/smc.h), since Debian has no smc-tools. Without an EID in common there is no SMC-Rv2, and
SMC-Rv1 needs a RoCE v1 address, which Soft-RoCE does not have.
"""
import os
import socket
import struct
import sys

REQUEST_ACK = 5
CTRL, GETFAMILY, FAMILY_ID, FAMILY_NAME = 16, 3, 1, 2
PNETID_ADD, PNET_NAME, PNET_ETH, PNET_IB, PNET_IBPORT = 2, 1, 2, 3, 4
UEID_ADD, UEID_ENTRY = 10, 1


def attribute(kind, data):
    out = struct.pack("HH", 4 + len(data), kind) + data
    return out + bytes(-len(out) % 4)


def ask(nl, family, command, *attributes):
    body = struct.pack("BBH", command, 1, 0) + b"".join(attributes)
    nl.send(struct.pack("IHHII", 16 + len(body), family, REQUEST_ACK, 1, 0) + body)
    answer = b""
    while True:
        part = nl.recv(65536)
        size, kind = struct.unpack_from("IH", part)
        if kind == 2:
            error = struct.unpack_from("i", part, 16)[0]
            if error:
                raise OSError(-error, os.strerror(-error))
            return answer
        answer = part[20:size]


def family(nl, name):
    rest = ask(nl, CTRL, GETFAMILY, attribute(FAMILY_NAME, name + b"\0"))
    while rest:
        size, kind = struct.unpack_from("HH", rest)
        if kind == FAMILY_ID:
            return struct.unpack_from("H", rest, 4)[0]
        rest = rest[(size + 3) & ~3:]
    raise KeyError(name)


eid, devices = sys.argv[1].encode(), sys.argv[2:]
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as nl:
    nl.bind((0, 0))
    pnet = family(nl, b"SMC_PNETID")
    for device in devices:
        name, network = (w.encode() + b"\0" for w in device.split("="))
        if os.path.exists(b"/sys/class/infiniband/" + name[:-1]):
            what = attribute(PNET_IB, name) + attribute(PNET_IBPORT, b"\1")
        else:
            what = attribute(PNET_ETH, name)
        ask(nl, pnet, PNETID_ADD, attribute(PNET_NAME, network), what)
    ask(nl, family(nl, b"SMC_GEN_NETLINK"), UEID_ADD, attribute(UEID_ENTRY, eid.ljust(32) + b"\0"))
