"""The addresses by which the nodes of a job reach each other. One that other nodes cannot use is refused before ranks wait for it.

By default Gloo, Horovod and torchrun use the host's own name. On Debian and Ubuntu that gives 127.0.1.1, in containers often
nothing, and on nodes with several networks any of them. Imports without torch.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

from runtime.interfaces import interface_addresses

from .topology import Topology, TopologyError, hosts_of, rendezvous

LOOPBACK = "127.0.0.1"

_NAMES_INTERFACE = ("TSM_NETWORK_INTERFACE", "GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME")


def look_up(host: str) -> str:
    """Return an address of a host, IPv4 if it has one. Raises OSError if its name does not resolve."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(next((each for each in found if each[0] == socket.AF_INET), found[0])[4][0])


def source_address(address: str) -> str:
    """Return this host's address on the way to another address; sends nothing. Raises OSError if there is no way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as unsent:
        unsent.connect((address, 9))
        return str(unsent.getsockname()[0])


@dataclass(frozen=True)
class Network:
    """The answers of this host's resolver and kernel. Tests give their own."""

    look_up: Callable[[str], str] = look_up
    source_address: Callable[[str], str] = source_address
    interface_addresses: Callable[[], list[tuple[str, str]]] = interface_addresses


_HERE = Network()


def own_address(topology: Topology, environ: Mapping[str, str] = os.environ, network: Network = _HERE) -> str:
    """Return the address by which the other nodes reach this one; 127.0.0.1 if there are none.

    The first of: the address of the interface that a variable names, the source address of packets to another node, the address of
    this host's name, the only address of this host. Raises TopologyError if other nodes could not use what is left.
    """
    if topology.local_size == topology.size:
        return LOOPBACK
    named = _named_interface(environ)
    if named is not None:
        return _address_of(*named, topology.host, network)
    for host in (*_other_hosts(topology, environ), topology.host):
        with suppress(OSError):
            address = network.source_address(network.look_up(host))
            if not _is_loopback(address):
                return address
    reachable = [address for _, address in network.interface_addresses() if not _is_loopback(address)]
    of_one_family = [address for address in reachable if ":" not in address] or reachable
    if len(of_one_family) == 1:
        return of_one_family[0]
    raise TopologyError(
        f"rank {topology.rank} on {topology.host} finds no address for the other nodes: its own name is a loopback address or does "
        f"not resolve, and it has {_listed(network)}. Fix: TSM_NETWORK_INTERFACE=NAME of the interface between the nodes, or give "
        f"{topology.host} that interface's address in /etc/hosts, in place of 127.0.1.1"
    )


def rendezvous_address(
    topology: Topology, environ: Mapping[str, str] = os.environ, network: Network = _HERE
) -> tuple[str, int]:
    """Return (address, port) of rank 0's rendezvous, as this process reaches it. Raises TopologyError if it cannot."""
    host, port = rendezvous(environ)
    if topology.local_size == topology.size:
        return LOOPBACK, port
    try:
        address = network.look_up(host)
    except OSError as error:
        raise TopologyError(
            f"rank {topology.rank} on {topology.host} cannot look up {host}, the host of rank 0: {error}. "
            "Fix: MASTER_ADDR=ADDRESS for all tasks"
        ) from None
    if not _is_loopback(address):
        return address, port
    if topology.node > 0 and not _is_loopback(own_address(topology, environ, network)):
        raise TopologyError(
            f"rank {topology.rank} on {topology.host} looks up {host}, the host of rank 0, and finds {address}, which is this node "
            f"itself. Fix: correct the address of {host} in /etc/hosts on {topology.host}, or MASTER_ADDR=ADDRESS for all tasks"
        )
    return own_address(topology, environ, network), port


def check_own_name(topology: Topology, environ: Mapping[str, str] = os.environ, network: Network = _HERE) -> None:
    """Check that this host's own name leads to an address for the other nodes, where Horovod runs over Gloo.

    Horovod 0.28.1 forgets HOROVOD_GLOO_IFACE for its process sets and looks up the host's own name. It crashes if that does not
    resolve, and on several nodes the others cannot connect to a loopback address. Raises TopologyError in both cases.
    """
    address = own_address(topology, environ, network)
    try:
        found = network.look_up(topology.host)
    except OSError as error:
        reason = f"does not resolve: {error}"
    else:
        if not _is_loopback(found) or _is_loopback(address):
            return
        reason = f"is {found}, which other nodes cannot reach"
    raise TopologyError(
        f"rank {topology.rank} on {topology.host}: Horovod uses this host's own name, which {reason}. "
        f"Fix: the line `{address} {topology.host}` in /etc/hosts on {topology.host}, in place of any other for this name; "
        "or distributed.backend=torch"
    )


def set_interfaces(
    topology: Topology, environ: MutableMapping[str, str] = os.environ, network: Network = _HERE
) -> None:
    """Let Gloo and Horovod use the interface of `own_address`, unless their variables are set.

    NCCL chooses well between networks by itself, so it gets an interface only on one node, where it must not listen to others, or
    where TSM_NETWORK_INTERFACE names one.
    """
    address = own_address(topology, environ, network)
    name = next((name for name, each in network.interface_addresses() if each == address), None)
    if name is None:
        return
    environ.setdefault("GLOO_SOCKET_IFNAME", name)
    environ.setdefault("HOROVOD_GLOO_IFACE", name)
    if topology.local_size == topology.size or environ.get("TSM_NETWORK_INTERFACE"):
        environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _other_hosts(topology: Topology, environ: Mapping[str, str]) -> Iterator[str]:
    """Return hosts whose direction shows which of this host's addresses the job uses: rank 0's, or on its node another one."""
    if environ.get("MASTER_ADDR"):
        yield environ["MASTER_ADDR"]
    hosts = hosts_of(environ.get("SLURM_STEP_NODELIST", ""))
    first = next(hosts, None)
    other = next(hosts, None) if topology.node == 0 else first
    if other is not None:
        yield other
    # Set by horovodrun.
    if environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"):
        yield environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]


def _named_interface(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the first variable that names an interface, and its value. NCCL's `^name` names what to avoid."""
    values = ((variable, environ.get(variable, "")) for variable in _NAMES_INTERFACE)
    return next(((variable, value) for variable, value in values if value and not value.startswith("^")), None)


def _address_of(variable: str, value: str, host: str, network: Network) -> str:
    names = tuple(value.lstrip("=").split(","))
    # NCCL's names are prefixes, unless it begins with `=`.
    is_prefix = variable == "NCCL_SOCKET_IFNAME" and not value.startswith("=")
    found = [
        address
        for name, address in network.interface_addresses()
        if (name.startswith(names) if is_prefix else name in names)
    ]
    if not found:
        raise TopologyError(
            f"{variable}={value}, but {host} has no such interface with an address, only {_listed(network)}. "
            f"Fix: {variable}=NAME of the interface between the nodes"
        )
    return next((address for address in found if ":" not in address), found[0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _listed(network: Network) -> str:
    return ", ".join(f"{name} {address}" for name, address in network.interface_addresses()) or "no interface"
